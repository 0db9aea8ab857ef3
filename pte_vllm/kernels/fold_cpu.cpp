// What a fold takes from evicted blocks: the sums of k^T v and k^T k over their tokens, straight
// from the paged cache. pte_vllm/kernels/fold_cpu.py says what is meant; native.py compiles it.
//
// Every layer of every sequence is computed alone and in one order, so a fold gives the same bits
// whoever folds beside it.
//
// Letters in shapes: L layers, S sequences, n blocks of bs tokens, m = n bs, H heads, D head size,
// r rank, R rank padded to whole vectors.

#include "cpu_numbers.h"

#include <vector>

namespace {

template <typename Number>
struct Fold {
    const Number* const* caches;  // [L], each [blocks, H, bs * 2 D]
    const float* scales;  // [L, 2], of stored keys and values; null: they are as stored
    int64_t block_stride, head_stride;  // in numbers
    const int64_t* key_index;    // [bs, D], offsets over a head's part of a block
    const int64_t* value_index;  // [bs, D]
    const int64_t* block_ids;    // [S, n]
    const int64_t* positions;    // [S, n], of the first token of each block
    const float* cos;            // [positions, half]; null: keys as cached
    const float* sin;
    const float* w_k;  // [L, H D, R], transposed
    const float* w_v;
    const float* b_k;  // [L, R]
    const float* b_v;
    int64_t num_layers, num_sequences, num_blocks, block_size, heads, dim, half, rank;
    bool squared;  // whether phi squares keys
    float* kv;  // [L, S, r, r]
    float* kk;  // the same; null: not wanted

    int64_t width() const { return heads * dim; }
};

// Tokens of one block as float32, `[bs, H D]`.
template <typename Number>
void gather(const Fold<Number>& f, const Number* block, const int64_t* index, float scale,
            float* out) {
    for (int64_t h = 0; h < f.heads; ++h) {
        const Number* from = block + h * f.head_stride;
        for (int64_t t = 0; t < f.block_size; ++t)
            for (int64_t d = 0; d < f.dim; ++d)
                out[t * f.width() + h * f.dim + d] =
                    to_float(from[index[t * f.dim + d]]) * scale;
    }
}

// Undoes RoPE as `method.reference.unrotate` does.
template <typename Number>
void unrotate(const Fold<Number>& f, int64_t position, float* keys) {
    for (int64_t t = 0; t < f.block_size; ++t) {
        const float* cos = f.cos + (position + t) * f.half;
        const float* sin = f.sin + (position + t) * f.half;
        for (int64_t h = 0; h < f.heads; ++h) {
            float* low = keys + t * f.width() + h * f.dim;
            float* high = low + f.half;
            for (int64_t d = 0; d < f.half; ++d) {
                const float a = low[d], b = high[d];
                const float norm = cos[d] * cos[d] + sin[d] * sin[d];
                low[d] = (a * cos[d] + b * sin[d]) / norm;
                high[d] = (b * cos[d] - a * sin[d]) / norm;
            }
        }
    }
}

// out[count, R] = x[count, width] w[width, R] + bias
template <int64_t vectors, int64_t count>
void project(const float* x, int64_t width, const float* w, const float* bias, float* out) {
    Vector sums[count][vectors];
    for (int64_t t = 0; t < count; ++t)
        for (int64_t v = 0; v < vectors; ++v) sums[t][v] = load(bias + v * kLanes);
    for (int64_t d = 0; d < width; ++d)
        for (int64_t v = 0; v < vectors; ++v) {
            const Vector row = load(w + (d * vectors + v) * kLanes);
            for (int64_t t = 0; t < count; ++t) sums[t][v] += row * x[t * width + d];
        }
    for (int64_t t = 0; t < count; ++t)
        for (int64_t v = 0; v < vectors; ++v) store(out + (t * vectors + v) * kLanes, sums[t][v]);
}

template <int64_t vectors>
void project_all(const float* x, int64_t tokens, int64_t width, const float* w, const float* bias,
                 float* out) {
    constexpr int64_t together = vectors > 4 ? 2 : 4;  // as many sums as there are registers for
    int64_t t = 0;
    for (; t + together <= tokens; t += together)
        project<vectors, together>(x + t * width, width, w, bias, out + t * vectors * kLanes);
    for (; t < tokens; ++t)
        project<vectors, 1>(x + t * width, width, w, bias, out + t * vectors * kLanes);
}

// out[r, r] = k^T v of `tokens` rows, `[tokens, R]` each
template <int64_t vectors>
void product(const float* k, const float* v, int64_t tokens, int64_t rank, float* out) {
    constexpr int64_t stride = vectors * kLanes;
    for (int64_t row = 0; row < rank; ++row) {
        Vector sums[vectors] = {};
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t i = 0; i < vectors; ++i)
                sums[i] += load(v + t * stride + i * kLanes) * k[t * stride + row];
        float padded[stride];
        for (int64_t i = 0; i < vectors; ++i) store(padded + i * kLanes, sums[i]);
        std::memcpy(out + row * rank, padded, rank * sizeof(float));
    }
}

template <typename Number, int64_t vectors>
void fold_one(const Fold<Number>& f, int64_t layer, int64_t sequence) {
    constexpr int64_t padded = vectors * kLanes;
    static thread_local std::vector<float> scratch;
    const int64_t tokens = f.num_blocks * f.block_size;
    scratch.resize(f.block_size * f.width() + 2 * tokens * padded);
    float* read = scratch.data();
    float* k = read + f.block_size * f.width();
    float* v = k + tokens * padded;
    const float* w_k = f.w_k + layer * f.width() * padded;
    const float* w_v = f.w_v + layer * f.width() * padded;
    const float k_scale = f.scales == nullptr ? 1.0f : f.scales[2 * layer];
    const float v_scale = f.scales == nullptr ? 1.0f : f.scales[2 * layer + 1];
    for (int64_t b = 0; b < f.num_blocks; ++b) {
        const int64_t done = b * f.block_size, own = sequence * f.num_blocks + b;
        const Number* block = f.caches[layer] + f.block_ids[own] * f.block_stride;
        gather(f, block, f.key_index, k_scale, read);
        if (f.cos != nullptr) unrotate(f, f.positions[own], read);
        project_all<vectors>(read, f.block_size, f.width(), w_k, f.b_k + layer * padded,
                             k + done * padded);
        if (f.squared)
            for (float* number = k + done * padded; number < k + (done + f.block_size) * padded;
                 ++number)
                *number *= *number;
        gather(f, block, f.value_index, v_scale, read);
        project_all<vectors>(read, f.block_size, f.width(), w_v, f.b_v + layer * padded,
                             v + done * padded);
    }
    const int64_t place = (layer * f.num_sequences + sequence) * f.rank * f.rank;
    product<vectors>(k, v, tokens, f.rank, f.kv + place);
    if (f.kk != nullptr) product<vectors>(k, k, tokens, f.rank, f.kk + place);
}

template <typename Number, int64_t vectors>
void fold_all(const Fold<Number>& f) {
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int64_t layer = 0; layer < f.num_layers; ++layer)
        for (int64_t sequence = 0; sequence < f.num_sequences; ++sequence)
            fold_one<Number, vectors>(f, layer, sequence);
}

// `vectors`: R / 16, one of those below; fold_cpu.py pads to it.
template <typename Number>
void fold(const Fold<Number>& f, int64_t vectors) {
    switch (vectors) {
        case 1: return fold_all<Number, 1>(f);
        case 2: return fold_all<Number, 2>(f);
        case 4: return fold_all<Number, 4>(f);
        case 8: return fold_all<Number, 8>(f);
    }
}

}  // namespace

#define PTE_FOLD(name, Number)                                                                     \
    extern "C" void name(const Number* const* caches, const float* scales,                         \
                         int64_t block_stride, int64_t head_stride,                                \
                         const int64_t* key_index, const int64_t* value_index,                     \
                         const int64_t* block_ids, const int64_t* positions, const float* cos,     \
                         const float* sin, const float* w_k, const float* w_v, const float* b_k,   \
                         const float* b_v, int64_t num_layers, int64_t num_sequences,              \
                         int64_t num_blocks, int64_t block_size, int64_t heads, int64_t dim,       \
                         int64_t half, int64_t rank, bool squared, int64_t vectors,                \
                         float* kv, float* kk) {                                                   \
        fold(Fold<Number>{caches, scales, block_stride, head_stride, key_index, value_index,       \
                          block_ids, positions, cos, sin, w_k, w_v, b_k, b_v, num_layers,          \
                          num_sequences, num_blocks, block_size, heads, dim, half, rank, squared,  \
                          kv, kk},                                                                 \
             vectors);                                                                             \
    }

PTE_FOLD(pte_fold_float32, float)
PTE_FOLD(pte_fold_bfloat16, BFloat16)
PTE_FOLD(pte_fold_float8_e4m3fn, Float8E4M3)
PTE_FOLD(pte_fold_float8_e5m2, Float8E5M2)
