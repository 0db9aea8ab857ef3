// State-modulated LoRA: y += B_slice (S^T (A_slice x)), all slices of one linear
// and all three products in one call. pte_vllm/ops/native.py compiles it; lora_cpu.py packs for it.
//
// Letters in shapes: T tokens, n slices, R rank, D outputs.

#include "cpu_numbers.h"

#include <vector>

namespace {

constexpr int64_t kTile = 64;       // outputs of one tile of B; lora_cpu.py packs them so
constexpr int64_t kVectors = kTile / kLanes;
constexpr int64_t kShrink = 8;      // tokens that share one reading of A: as many running sums
constexpr int64_t kExpand = 4;      // of B: four vectors of a tile for each
constexpr int64_t kBlock = 64;      // tokens whose inputs stay in a core's cache

// One linear of one adapter, and the tokens that go through it.
template <typename Number>
struct Work {
    const Number* a;       // [n R, d_pad]
    const Number* b;       // [tiles, R, 64]
    const int32_t* tiles;  // [tiles, 3]: slice, first output, outputs
    int64_t num_tiles, d_in, d_pad, rank, num_slices;
    const float* states;   // [slots, R, R] multiplied from the right; null: the identity
    const int64_t* slots;  // [T]
    const Number* x;
    int64_t x_stride;
    Number* y;
    int64_t y_stride;
    float* wide;    // [T, d_pad], x
    float* shrunk;  // [T, n, R], A x
    float* read;    // [T, n, R], S^T A x

    int64_t rows() const { return num_slices * rank; }

    void widen(int64_t t) const {
        for (int64_t d = 0; d < d_in; ++d) wide[t * d_pad + d] = to_float(x[t * x_stride + d]);
        for (int64_t d = d_in; d < d_pad; ++d) wide[t * d_pad + d] = 0.0f;
    }

    // A x of one row of A for tokens [first, end).
    void shrink(int64_t row, int64_t first, int64_t end) const {
        for (; first + kShrink <= end; first += kShrink) shrink_some<kShrink>(row, first);
        for (; first < end; ++first) shrink_some<1>(row, first);
    }

    template <int64_t count>
    void shrink_some(int64_t row, int64_t first) const {
        const Number* weights = a + row * d_pad;
        Vector sums[count] = {};
        for (int64_t d = 0; d < d_pad; d += kLanes) {
            const Vector w = load(weights + d);
            for (int64_t t = 0; t < count; ++t) sums[t] += w * load(wide + (first + t) * d_pad + d);
        }
        for (int64_t t = 0; t < count; ++t) shrunk[(first + t) * rows() + row] = sum(sums[t]);
    }

    // S^T A x of one token, all slices.
    void modulate(int64_t t) const {
        const float* state = states + slots[t] * rank * rank;
        for (int64_t slice = 0; slice < num_slices; ++slice) {
            const float* in = shrunk + t * rows() + slice * rank;
            float* out = read + t * rows() + slice * rank;
            for (int64_t c = 0; c < rank; ++c) out[c] = 0.0f;
            for (int64_t r = 0; r < rank; ++r)
                for (int64_t c = 0; c < rank; ++c) out[c] += in[r] * state[r * rank + c];
        }
    }

    // y of one tile of outputs for tokens [first, end).
    void expand(int64_t tile, int64_t first, int64_t end) const {
        for (; first + kExpand <= end; first += kExpand) expand_some<kExpand>(tile, first);
        for (; first < end; ++first) expand_some<1>(tile, first);
    }

    template <int64_t count>
    void expand_some(int64_t tile, int64_t first) const {
        const int32_t* about = tiles + 3 * tile;
        const Number* weights = b + tile * rank * kTile;
        const float* in = (states ? read : shrunk) + first * rows() + about[0] * rank;
        Vector sums[count][kVectors] = {};
        for (int64_t r = 0; r < rank; ++r)
            for (int64_t v = 0; v < kVectors; ++v) {
                const Vector w = load(weights + r * kTile + v * kLanes);
                for (int64_t t = 0; t < count; ++t) sums[t][v] += w * in[t * rows() + r];
            }
        for (int64_t t = 0; t < count; ++t) {
            Number* out = y + (first + t) * y_stride + about[1];
            for (int64_t v = 0; v < kVectors; ++v, out += kLanes) {
                const int64_t left = about[2] - v * kLanes;
                if (left >= kLanes) {
                    store(out, load(out) + sums[t][v]);
                } else if (left > 0) {
                    Number padded[kLanes] = {};
                    std::memcpy(padded, out, left * sizeof(Number));
                    store(padded, load(padded) + sums[t][v]);
                    std::memcpy(out, padded, left * sizeof(Number));
                }
            }
        }
    }
};

template <typename Number>
void add(Work<Number> work, int64_t tokens) {
    static thread_local std::vector<float> scratch;
    scratch.resize(tokens * (work.d_pad + 2 * work.rows()));
    work.wide = scratch.data();
    work.shrunk = work.wide + tokens * work.d_pad;
    work.read = work.shrunk + tokens * work.rows();

    if (tokens <= kBlock) {  // threads share out the weights
#pragma omp parallel
        {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < tokens; ++t) work.widen(t);
#pragma omp for schedule(static)
            for (int64_t row = 0; row < work.rows(); ++row) work.shrink(row, 0, tokens);
            if (work.states != nullptr) {
#pragma omp for schedule(static)
                for (int64_t t = 0; t < tokens; ++t) work.modulate(t);
            }
#pragma omp for schedule(static)
            for (int64_t tile = 0; tile < work.num_tiles; ++tile) work.expand(tile, 0, tokens);
        }
        return;
    }
#pragma omp parallel for schedule(dynamic)
    for (int64_t first = 0; first < tokens; first += kBlock) {  // threads share out the tokens
        const int64_t end = first + kBlock < tokens ? first + kBlock : tokens;
        for (int64_t t = first; t < end; ++t) work.widen(t);
        for (int64_t row = 0; row < work.rows(); ++row) work.shrink(row, first, end);
        if (work.states != nullptr)
            for (int64_t t = first; t < end; ++t) work.modulate(t);
        for (int64_t tile = 0; tile < work.num_tiles; ++tile) work.expand(tile, first, end);
    }
}

}  // namespace

// Strides are of rows, in numbers; scratch space is the function's own.
#define PTE_LORA(name, Number)                                                                     \
    extern "C" void name(const Number* a, const Number* b, const int32_t* tiles, int64_t num_tiles, \
                         int64_t d_in, int64_t d_pad, int64_t rank, int64_t num_slices,            \
                         const float* states, const int64_t* slots, const Number* x,               \
                         int64_t x_stride, Number* y, int64_t y_stride, int64_t tokens) {          \
        add<Number>({a, b, tiles, num_tiles, d_in, d_pad, rank, num_slices, states, slots, x,      \
                     x_stride, y, y_stride, nullptr, nullptr, nullptr},                            \
                    tokens);                                                                       \
    }

PTE_LORA(pte_lora_float32, float)
PTE_LORA(pte_lora_bfloat16, BFloat16)
