// Numbers as the compiled code reads and writes them: float32 inside, whatever the model's.
// Vectors are GCC's, 16 floats wide: the compiler splits them for CPUs that have less.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kLanes = 16;
typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

struct BFloat16 {
    uint16_t bits;
};

// Numbers of 8 bits, as caches hold them. What a byte means is looked up.
struct Float8E4M3 {  // no infinities; all bits but the sign set: not a number
    uint8_t bits;
    static constexpr int kMantissa = 3, kBias = 7;
    static constexpr bool kInfinities = false;
};

struct Float8E5M2 {  // as half precision, less its last byte
    uint8_t bits;
    static constexpr int kMantissa = 2, kBias = 15;
    static constexpr bool kInfinities = true;
};

inline Vector load(const float* from) {
    Vector out;
    std::memcpy(&out, from, sizeof out);
    return out;
}

inline Vector load(const BFloat16* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return (Vector)(__builtin_convertvector(halves, Bits) << 16);
}

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) {
    uint32_t bits = uint32_t(value.bits) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

template <typename Format>
struct Float8Values {
    float of[256];

    Float8Values() {
        for (int byte = 0; byte < 256; ++byte) of[byte] = value(byte);
    }

    static float value(int byte) {
        constexpr int kFraction = 1 << Format::kMantissa, kLast = 0x7f >> Format::kMantissa;
        const int exponent = (byte & 0x7f) >> Format::kMantissa, fraction = byte % kFraction;
        float size;
        if (exponent == kLast && (Format::kInfinities || fraction == kFraction - 1))
            size = Format::kInfinities && fraction == 0 ? INFINITY : NAN;
        else if (exponent == 0)  // subnormal
            size = std::ldexp(float(fraction), 1 - Format::kBias - Format::kMantissa);
        else
            size = std::ldexp(float(kFraction + fraction),
                              exponent - Format::kBias - Format::kMantissa);
        return byte & 0x80 ? -size : size;
    }
};

template <typename Format>
const Float8Values<Format> kFloat8Values;

inline float to_float(Float8E4M3 value) { return kFloat8Values<Float8E4M3>.of[value.bits]; }
inline float to_float(Float8E5M2 value) { return kFloat8Values<Float8E5M2>.of[value.bits]; }

inline void store(float* to, Vector value) { std::memcpy(to, &value, sizeof value); }

inline void store(BFloat16* to, Vector value) {  // round to nearest, ties to even
    const Bits bits = (Bits)value;
    const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Bits nan = (Bits)((bits & 0x7fffffffu) > 0x7f800000u);  // stays one
    const Halves halves = __builtin_convertvector((nan & 0x7fc0u) | (~nan & rounded), Halves);
    std::memcpy(to, &halves, sizeof halves);
}

inline void store(float* to, float value) { *to = value; }

inline void store(BFloat16* to, float value) {
    BFloat16 all[kLanes];
    store(all, Vector{} + value);
    *to = all[0];
}

// Products along a vector of 16 x 4 bytes: one float32 in each of its lanes, or two bfloat16.

template <typename Number>
constexpr int64_t kPairs = sizeof(float) / sizeof(Number);

template <typename Number>
inline Bits load_bits(const Number* from) {
    Bits out;
    std::memcpy(&out, from, sizeof out);
    return out;
}

template <typename Number>
inline Bits repeat_bits(const Number* from) {  // one lane's numbers in all of them
    uint32_t bits;
    std::memcpy(&bits, from, sizeof bits);
    return Bits{} + bits;
}

inline Vector add_products(Vector to, Bits a, Bits b, float) { return to + (Vector)a * (Vector)b; }

inline Vector add_products(Vector to, Bits a, Bits b, BFloat16) {
#ifdef __AVX512BF16__
    return (Vector)_mm512_dpbf16_ps((__m512)to, (__m512bh)a, (__m512bh)b);
#else
    const Bits high = Bits{} + 0xffff0000u;
    to += (Vector)(a << 16) * (Vector)(b << 16);
    return to + (Vector)(a & high) * (Vector)(b & high);
#endif
}

inline float sum(Vector v) {
    float part[kLanes];
    std::memcpy(part, &v, sizeof part);
    for (int64_t width = kLanes / 2; width > 0; width /= 2)  // a tree: few additions wait in line
        for (int64_t i = 0; i < width; ++i) part[i] += part[i + width];
    return part[0];
}

}  // namespace
