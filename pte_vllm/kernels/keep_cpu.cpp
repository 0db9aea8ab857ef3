// Kept tokens on a CPU, straight from the paged cache: scores of candidates, and the copies of what
// is kept. pte_vllm/kernels/keep_cpu.py says what is meant; native.py compiles it.
//
// Every KV head of every layer of every sequence is computed alone and in one order, so a choice is
// the same whoever folds beside it.
//
// Letters in shapes: L layers, S sequences, H heads, D head size, n probes, c blocks of candidates,
// e newest blocks of bs tokens, C = c bs, T = (c + e) bs, K tokens that are kept, k = K / bs.

#include "cpu_numbers.h"

#include <cmath>
#include <vector>

namespace {

template <typename Number>
struct Cache {
    Number* const* caches;              // [L], each [blocks, H, bs * 2 D]
    const float* scales;                // [L, 2], of stored keys and values; null: as stored
    int64_t block_stride, head_stride;  // in numbers
    const int64_t* cells;               // [bs, 2 D], offsets over a head's part of a block
    int64_t num_layers, num_sequences, heads, block_size, dim;

    float k_scale(int64_t layer) const { return scales == nullptr ? 1.0f : scales[2 * layer]; }
    float v_scale(int64_t layer) const { return scales == nullptr ? 1.0f : scales[2 * layer + 1]; }

    Number* head(int64_t layer, int64_t block, int64_t h) const {
        return caches[layer] + block * block_stride + h * head_stride;
    }
};

// e^x to about 2e-7 of it, for x <= 0; below -87 it is 0.
inline Vector exponential(Vector x) {
    typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));
    const Vector power = x * 1.44269504f;
    const Integers whole = __builtin_convertvector(power - 0.5f, Integers);
    const Vector floor = __builtin_convertvector(whole, Vector);
    // x less floor * ln 2, in two parts so that no digits are lost
    const Vector rest = (x - floor * 0.693359375f) + floor * 2.12194440e-4f;
    Vector sum = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    const Vector scale = (Vector)((whole + 127) << 23);
    const Bits in_range = (Bits)(x > -87.0f);
    return (Vector)((Bits)(sum * scale) & in_range);
}

inline Vector larger(Vector a, Vector b) {
    const Bits first = (Bits)(a > b);
    return (Vector)(((Bits)a & first) | ((Bits)b & ~first));
}

// The keys of one head of some blocks, one row for each of its D numbers, `[D, stride]`.
template <typename Number>
void keys_by_number(const Cache<Number>& c, int64_t layer, int64_t h, const int64_t* blocks,
                    int64_t count, int64_t stride, float* out) {
    const float scale = c.k_scale(layer);
    for (int64_t b = 0; b < count; ++b) {
        const Number* from = c.head(layer, blocks[b], h);
        for (int64_t t = 0; t < c.block_size; ++t)
            for (int64_t d = 0; d < c.dim; ++d)
                out[d * stride + b * c.block_size + t] =
                    to_float(from[c.cells[t * 2 * c.dim + d]]) * scale;
    }
}

template <typename Number>
void norms_of_values(const Cache<Number>& c, int64_t layer, int64_t h, const int64_t* blocks,
                     int64_t count, float* out) {
    const float scale = c.v_scale(layer);
    for (int64_t b = 0; b < count; ++b) {
        const Number* from = c.head(layer, blocks[b], h);
        for (int64_t t = 0; t < c.block_size; ++t) {
            const int64_t* cells = c.cells + t * 2 * c.dim + c.dim;
            float squares = 0;
            for (int64_t d = 0; d < c.dim; ++d) {
                const float v = to_float(from[cells[d]]) * scale;
                squares += v * v;
            }
            out[b * c.block_size + t] = std::sqrt(squares);
        }
    }
}

struct Probes {
    const float* queries;     // [L, H, n, D]
    const int64_t* positions;  // [S, n]
    const float* cos;          // [positions, half]; null: as they are
    const float* sin;
    int64_t count, half;
    float scale;
};

// A probe turned to its position, and multiplied by the scale of attention.
void turned(const Probes& p, const float* query, int64_t position, int64_t dim, float* out) {
    for (int64_t d = 0; d < dim; ++d) out[d] = query[d] * p.scale;
    if (p.cos == nullptr) return;
    const float* cos = p.cos + position * p.half;
    const float* sin = p.sin + position * p.half;
    for (int64_t d = 0; d < p.half; ++d) {
        const float a = out[d], b = out[d + p.half];
        out[d] = a * cos[d] - b * sin[d];
        out[d + p.half] = b * cos[d] + a * sin[d];
    }
}

// Products of P probes with the keys of V vectors of tokens. So many at once that a key is loaded
// once for P products; each product is summed in the same order whatever P and V are.
template <int64_t P, int64_t V>
inline void products(const float* keys, int64_t stride, const float* queries, int64_t dim,
                     float* logits) {
    Vector sums[P][V] = {};
    for (int64_t d = 0; d < dim; ++d)
        for (int64_t v = 0; v < V; ++v) {
            const Vector key = load(keys + d * stride + v * kLanes);
            for (int64_t i = 0; i < P; ++i) sums[i][v] += key * queries[i * dim + d];
        }
    for (int64_t i = 0; i < P; ++i)
        for (int64_t v = 0; v < V; ++v) store(logits + i * stride + v * kLanes, sums[i][v]);
}

// The same with all `vectors`, to `logits: [P, stride]`.
template <int64_t P>
void all_products(const float* keys, int64_t vectors, int64_t stride, const float* queries,
                  int64_t dim, float* logits) {
#ifdef __AVX512F__  // four probes' sums fit into its 32 registers
    constexpr int64_t kTogether = 4;
#else
    constexpr int64_t kTogether = 1;
#endif
    int64_t v = 0;
    for (; v + kTogether <= vectors; v += kTogether)
        products<P, kTogether>(keys + v * kLanes, stride, queries, dim, logits + v * kLanes);
    for (; v < vectors; ++v)
        products<P, 1>(keys + v * kLanes, stride, queries, dim, logits + v * kLanes);
}

// Adds the square of each token's share of one probe's attention.
void add_squared_shares(float* logits, int64_t tokens, int64_t vectors, float* squares) {
    for (int64_t t = tokens; t < vectors * kLanes; ++t) logits[t] = -INFINITY;  // nobody's
    Vector most = Vector{} - INFINITY;
    for (int64_t v = 0; v < vectors; ++v) most = larger(load(logits + v * kLanes), most);
    float highest = most[0];
    for (int64_t lane = 1; lane < kLanes; ++lane) highest = std::max(highest, most[lane]);
    Vector total = {};
    for (int64_t v = 0; v < vectors; ++v) {
        const Vector e = exponential(load(logits + v * kLanes) - highest);
        store(logits + v * kLanes, e);
        total += e;
    }
    const float share = 1.0f / sum(total);
    for (int64_t v = 0; v < vectors; ++v) {
        const Vector e = load(logits + v * kLanes) * share;
        store(squares + v * kLanes, load(squares + v * kLanes) + e * e);
    }
}

template <typename Number>
void score_head(const Cache<Number>& c, const Probes& p, const int64_t* candidates,
                int64_t num_candidates, const int64_t* newest, int64_t num_newest, int64_t layer,
                int64_t sequence, int64_t h, float* out) {
    constexpr int64_t kProbes = 4;
    const int64_t wanted = num_candidates * c.block_size;
    const int64_t tokens = wanted + num_newest * c.block_size;
    const int64_t vectors = (tokens + kLanes - 1) / kLanes, stride = vectors * kLanes;
    static thread_local std::vector<float> scratch;
    scratch.assign((c.dim + kProbes + 1) * stride + kProbes * c.dim, 0.0f);
    float* keys = scratch.data();                // [D, stride]
    float* logits = keys + c.dim * stride;       // [kProbes, stride]
    float* squares = logits + kProbes * stride;  // [stride]
    float* query = squares + stride;             // [kProbes, D]
    keys_by_number(c, layer, h, candidates, num_candidates, stride, keys);
    keys_by_number(c, layer, h, newest, num_newest, stride, keys + wanted);
    const float* queries = p.queries + (layer * c.heads + h) * p.count * c.dim;
    const int64_t* positions = p.positions + sequence * p.count;
    for (int64_t first = 0; first < p.count; first += kProbes) {
        const int64_t here = std::min(kProbes, p.count - first);
        for (int64_t i = 0; i < here; ++i)
            turned(p, queries + (first + i) * c.dim, positions[first + i], c.dim,
                   query + i * c.dim);
        if (here == kProbes)
            all_products<kProbes>(keys, vectors, stride, query, c.dim, logits);
        else
            for (int64_t i = 0; i < here; ++i)
                all_products<1>(keys, vectors, stride, query + i * c.dim, c.dim,
                                logits + i * stride);
        for (int64_t i = 0; i < here; ++i)
            add_squared_shares(logits + i * stride, tokens, vectors, squares);
    }
    norms_of_values(c, layer, h, candidates, num_candidates, out);
    for (int64_t t = 0; t < wanted; ++t) out[t] *= std::sqrt(squares[t] / p.count);
}

template <typename Number>
void score_all(const Cache<Number>& c, const Probes& p, const int64_t* candidates,
               int64_t num_candidates, const int64_t* newest, int64_t num_newest, float* out) {
    const int64_t wanted = num_candidates * c.block_size;
#pragma omp parallel for collapse(3) schedule(dynamic)
    for (int64_t layer = 0; layer < c.num_layers; ++layer)
        for (int64_t s = 0; s < c.num_sequences; ++s)
            for (int64_t h = 0; h < c.heads; ++h)
                score_head(c, p, candidates + s * num_candidates, num_candidates,
                           newest + s * num_newest, num_newest, layer, s, h,
                           out + ((layer * c.num_sequences + s) * c.heads + h) * wanted);
}

// Copies tokens of one head, as they are stored, between the cache and `[L, S, H, K, 2 D]`.
// `places`: which tokens of the blocks, `[L, S, H, K]`; null: all of them in their order.
template <bool out_of_cache, typename Number>
void copy_all(const Cache<Number>& c, const int64_t* blocks, int64_t num_blocks,
              const int64_t* places, int64_t count, Number* staged) {
    const int64_t width = 2 * c.dim;
#pragma omp parallel for collapse(3) schedule(static)
    for (int64_t layer = 0; layer < c.num_layers; ++layer)
        for (int64_t s = 0; s < c.num_sequences; ++s)
            for (int64_t h = 0; h < c.heads; ++h) {
                const int64_t row = ((layer * c.num_sequences + s) * c.heads + h) * count;
                for (int64_t i = 0; i < count; ++i) {
                    const int64_t place = places == nullptr ? i : places[row + i];
                    const int64_t block = blocks[s * num_blocks + place / c.block_size];
                    Number* cached = c.head(layer, block, h);
                    const int64_t* cells = c.cells + place % c.block_size * width;
                    Number* copied = staged + (row + i) * width;
                    for (int64_t d = 0; d < width; ++d) {
                        if (out_of_cache)
                            copied[d] = cached[cells[d]];
                        else
                            cached[cells[d]] = copied[d];
                    }
                }
            }
}

}  // namespace

#define PTE_KEEP(suffix, Number)                                                                   \
    extern "C" void pte_keep_scores_##suffix(                                                      \
        Number* const* caches, const float* scales, int64_t block_stride, int64_t head_stride,     \
        const int64_t* cells,                                                                      \
        int64_t num_layers, int64_t num_sequences, int64_t heads, int64_t block_size, int64_t dim, \
        const float* queries, const int64_t* positions, const float* cos, const float* sin,        \
        int64_t count, int64_t half, float scale, const int64_t* candidates,                       \
        int64_t num_candidates, const int64_t* newest, int64_t num_newest, float* out) {           \
        score_all(Cache<Number>{caches, scales, block_stride, head_stride, cells, num_layers,      \
                                num_sequences, heads, block_size, dim},                            \
                  Probes{queries, positions, cos, sin, count, half, scale}, candidates,            \
                  num_candidates, newest, num_newest, out);                                        \
    }                                                                                              \
    extern "C" void pte_keep_copy_##suffix(                                                        \
        Number* const* caches, const float* scales, int64_t block_stride, int64_t head_stride,     \
        const int64_t* cells,                                                                      \
        int64_t num_layers, int64_t num_sequences, int64_t heads, int64_t block_size, int64_t dim, \
        const int64_t* blocks, int64_t num_blocks, const int64_t* places, int64_t count,           \
        Number* staged, bool out_of_cache) {                                                       \
        const Cache<Number> c{caches, scales, block_stride, head_stride, cells, num_layers,        \
                              num_sequences, heads, block_size, dim};                              \
        if (out_of_cache)                                                                          \
            copy_all<true>(c, blocks, num_blocks, places, count, staged);                          \
        else                                                                                       \
            copy_all<false>(c, blocks, num_blocks, places, count, staged);                         \
    }

PTE_KEEP(float32, float)
PTE_KEEP(bfloat16, BFloat16)
PTE_KEEP(float8_e4m3fn, Float8E4M3)
PTE_KEEP(float8_e5m2, Float8E5M2)
