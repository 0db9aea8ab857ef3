// State-modulated LoRA: y += B_slice (S^T phi(A_slice x)), all slices of one linear
// and all three products in one call. pte_vllm/kernels/native.py compiles it; engine/lora/cpu.py packs for it.
//
// Letters in shapes: T tokens, n slices, R rank, D outputs.

#include "cpu_numbers.h"

#include <vector>

namespace {

constexpr int64_t kTile = 64;       // outputs of one tile of B; engine/lora/cpu.py packs them so
constexpr int64_t kVectors = kTile / kLanes;
constexpr int64_t kShrinkTokens = 8;  // that share one reading of A
constexpr int64_t kShrinkRows = 2;    // of A, that share one reading of x: 16 running sums
constexpr int64_t kExpandTokens = 4;  // that share one reading of B: four vectors of sums for each
constexpr int64_t kBlock = 64;        // tokens whose inputs stay in a core's cache

// One linear of one adapter, and the tokens that go through it. Products run over numbers that lie
// in one lane (two if they are bfloat16), so what they run over is padded with zeros to whole ones.
template <typename Number>
struct Work {
    const Number* a;       // [n R, d_pad]
    const Number* b;       // [tiles, r_pad / pairs, 64, pairs]
    const int32_t* tiles;  // [tiles, 3]: slice, first output, outputs
    int64_t num_tiles, d_in, d_pad, rank, r_pad, num_slices;
    const Number* states;  // [slots, R, R] multiplied from the right; null: the identity
    const bool* squared;   // [slots], whether phi squares
    const int64_t* slots;  // [T]
    const Number* x;
    int64_t x_stride;
    Number* y;
    int64_t y_stride;
    Number* padded;  // [T, d_pad], x where its rows are too short
    float* shrunk;   // [T, n, R], A x
    Number* read;    // [T, n, r_pad], S^T phi(A x)

    int64_t rows() const { return num_slices * rank; }

    void pad(int64_t t) const {
        std::memcpy(padded + t * d_pad, x + t * x_stride, d_in * sizeof(Number));
        std::memset(padded + t * d_pad + d_in, 0, (d_pad - d_in) * sizeof(Number));
    }

    const Number* input(int64_t t) const {
        return padded ? padded + t * d_pad : x + t * x_stride;
    }

    // A x of rows [row, row + count) of A for tokens [first, end).
    void shrink(int64_t row, int64_t first, int64_t end) const {
        if (row + kShrinkRows <= rows())
            shrink_rows<kShrinkRows>(row, first, end);
        else
            for (; row < rows(); ++row) shrink_rows<1>(row, first, end);
    }

    template <int64_t count>
    void shrink_rows(int64_t row, int64_t first, int64_t end) const {
        for (; first + kShrinkTokens <= end; first += kShrinkTokens)
            shrink_some<count, kShrinkTokens>(row, first);
        for (; first + 2 <= end; first += 2) shrink_some<count, 2>(row, first);
        for (; first < end; ++first) shrink_some<count, 1>(row, first);
    }

    template <int64_t count, int64_t tokens>
    void shrink_some(int64_t row, int64_t first) const {
        const Number* weights = a + row * d_pad;
        const Number* in[tokens];
        for (int64_t t = 0; t < tokens; ++t) in[t] = input(first + t);
        Vector sums[count][tokens] = {};
        for (int64_t d = 0; d < d_pad; d += kLanes * kPairs<Number>) {
            Bits w[count];
            for (int64_t i = 0; i < count; ++i) w[i] = load_bits(weights + i * d_pad + d);
            for (int64_t t = 0; t < tokens; ++t) {
                const Bits v = load_bits(in[t] + d);
                for (int64_t i = 0; i < count; ++i)
                    sums[i][t] = add_products(sums[i][t], w[i], v, Number{});
            }
        }
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t i = 0; i < count; ++i)
                shrunk[(first + t) * rows() + row + i] = sum(sums[i][t]);
    }

    // S^T phi(A x) of one token, all slices.
    void modulate(int64_t t) const {
        for (int64_t slice = 0; slice < num_slices; ++slice) {
            float* in = shrunk + t * rows() + slice * rank;
            Number* out = read + (t * num_slices + slice) * r_pad;
            const Number* state = states ? states + slots[t] * rank * rank : nullptr;
            if (state && squared[slots[t]])
                for (int64_t r = 0; r < rank; ++r) in[r] *= in[r];
            int64_t c = 0;
            for (; c + 2 * kLanes <= rank; c += 2 * kLanes) modulate_some<2>(in, state, c, out);
            for (; c + kLanes <= rank; c += kLanes) modulate_some<1>(in, state, c, out);
            for (; c < rank; ++c) {
                float value = state ? 0.0f : in[c];
                for (int64_t r = 0; state && r < rank; ++r)
                    value += in[r] * to_float(state[r * rank + c]);
                store(out + c, value);
            }
            for (; c < r_pad; ++c) out[c] = Number{};
        }
    }

    template <int64_t count>
    void modulate_some(const float* in, const Number* state, int64_t c, Number* out) const {
        Vector sums[count] = {};
        if (state == nullptr)
            for (int64_t v = 0; v < count; ++v) sums[v] = load(in + c + v * kLanes);
        for (int64_t r = 0; state && r < rank; ++r)
            for (int64_t v = 0; v < count; ++v)
                sums[v] += in[r] * load(state + r * rank + c + v * kLanes);
        for (int64_t v = 0; v < count; ++v) store(out + c + v * kLanes, sums[v]);
    }

    // y of one tile of outputs for tokens [first, end).
    void expand(int64_t tile, int64_t first, int64_t end) const {
        for (; first + kExpandTokens <= end; first += kExpandTokens)
            expand_some<kExpandTokens>(tile, first);
        for (; first < end; ++first) expand_some<1>(tile, first);
    }

    template <int64_t tokens>
    void expand_some(int64_t tile, int64_t first) const {
        const int32_t* about = tiles + 3 * tile;
        const Number* weights = b + tile * r_pad * kTile;
        const Number* in = read + (first * num_slices + about[0]) * r_pad;
        Vector sums[tokens][kVectors] = {};
        for (int64_t r = 0; r < r_pad; r += kPairs<Number>) {
            Bits w[kVectors];
            for (int64_t v = 0; v < kVectors; ++v)
                w[v] = load_bits(weights + r * kTile + v * kLanes * kPairs<Number>);
            for (int64_t t = 0; t < tokens; ++t) {
                const Bits value = repeat_bits(in + t * num_slices * r_pad + r);
                for (int64_t v = 0; v < kVectors; ++v)
                    sums[t][v] = add_products(sums[t][v], w[v], value, Number{});
            }
        }
        for (int64_t t = 0; t < tokens; ++t) {
            Number* out = y + (first + t) * y_stride + about[1];
            for (int64_t v = 0; v < kVectors; ++v, out += kLanes) {
                const int64_t left = about[2] - v * kLanes;
                if (left >= kLanes) {
                    store(out, load(out) + sums[t][v]);
                } else if (left > 0) {
                    Number part[kLanes] = {};
                    std::memcpy(part, out, left * sizeof(Number));
                    store(part, load(part) + sums[t][v]);
                    std::memcpy(out, part, left * sizeof(Number));
                }
            }
        }
    }
};

template <typename Number>
void add(Work<Number> work, int64_t tokens) {
    static thread_local std::vector<float> shrunk;
    static thread_local std::vector<Number> read, padded;
    shrunk.resize(tokens * work.rows());
    read.resize(tokens * work.num_slices * work.r_pad);
    work.shrunk = shrunk.data();
    work.read = read.data();
    if (work.d_in != work.d_pad) {
        padded.resize(tokens * work.d_pad);
        work.padded = padded.data();
    }

    if (tokens <= kBlock) {  // threads share out the weights
#pragma omp parallel
        {
            if (work.padded != nullptr) {
#pragma omp for schedule(static)
                for (int64_t t = 0; t < tokens; ++t) work.pad(t);
            }
#pragma omp for schedule(static)
            for (int64_t row = 0; row < work.rows(); row += kShrinkRows)
                work.shrink(row, 0, tokens);
#pragma omp for schedule(static)
            for (int64_t t = 0; t < tokens; ++t) work.modulate(t);
#pragma omp for schedule(static)
            for (int64_t tile = 0; tile < work.num_tiles; ++tile) work.expand(tile, 0, tokens);
        }
        return;
    }
#pragma omp parallel for schedule(dynamic)
    for (int64_t first = 0; first < tokens; first += kBlock) {  // threads share out the tokens
        const int64_t end = first + kBlock < tokens ? first + kBlock : tokens;
        if (work.padded != nullptr)
            for (int64_t t = first; t < end; ++t) work.pad(t);
        for (int64_t row = 0; row < work.rows(); row += kShrinkRows) work.shrink(row, first, end);
        for (int64_t t = first; t < end; ++t) work.modulate(t);
        for (int64_t tile = 0; tile < work.num_tiles; ++tile) work.expand(tile, first, end);
    }
}

}  // namespace

// Strides are of rows, in numbers; scratch space is the function's own.
#define PTE_LORA(name, Number)                                                                     \
    extern "C" void name(const Number* a, const Number* b, const int32_t* tiles, int64_t num_tiles, \
                         int64_t d_in, int64_t d_pad, int64_t rank, int64_t r_pad,                 \
                         int64_t num_slices,                                                       \
                         const Number* states, const bool* squared, const int64_t* slots,           \
                         const Number* x, int64_t x_stride, Number* y, int64_t y_stride,           \
                         int64_t tokens) {                                                         \
        add<Number>({a, b, tiles, num_tiles, d_in, d_pad, rank, r_pad, num_slices, states,         \
                     squared, slots, x, x_stride, y, y_stride, nullptr, nullptr, nullptr},    \
                    tokens);                                                                       \
    }

PTE_LORA(pte_lora_float32, float)
PTE_LORA(pte_lora_bfloat16, BFloat16)
