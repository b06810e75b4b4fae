// Sixteen floats at a time in GCC's and Clang's vector extensions: the compiler makes AVX-512, AVX2, SSE2 or
// NEON of them, so one source serves every machine. Functions marked ELLE_SIMD are compiled once per x86-64
// level and the loader picks the best; what they call must be ELLE_INLINE.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define ELLE_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define ELLE_SIMD
#endif
#define ELLE_INLINE inline __attribute__((always_inline))
// On lambdas too: one that is not inlined keeps the default target, and takes vectors in other registers.
#define ELLE_LAMBDA __attribute__((always_inline))

#if defined(__GNUC__) && !defined(__clang__)
// Vectors are passed between inlined functions only, so their calling convention is of no interest.
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace elle_mp {

constexpr int kLanes = 16;

typedef float F32 __attribute__((vector_size(64)));
typedef uint32_t U32 __attribute__((vector_size(64)));
typedef int32_t I32 __attribute__((vector_size(64)));
typedef uint16_t U16 __attribute__((vector_size(32)));

// A bfloat16 as its bits.
struct BFloat16 {
    uint16_t bits;
};

ELLE_INLINE F32 Fill(float x) { return F32{} + x; }

ELLE_INLINE F32 Choose(I32 mask, F32 yes, F32 no) { return (F32)(((I32)yes & mask) | ((I32)no & ~mask)); }

ELLE_INLINE F32 Max(F32 a, F32 b) { return Choose(a > b, a, b); }

ELLE_INLINE F32 Load(const float* p) {
    F32 x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

ELLE_INLINE F32 Load(const BFloat16* p) {
    U16 x;
    std::memcpy(&x, p, sizeof x);
    return (F32)(__builtin_convertvector(x, U32) << 16);
}

ELLE_INLINE void Store(float* p, F32 x) { std::memcpy(p, &x, sizeof x); }

// Rounds to nearest even. Not for NaN.
ELLE_INLINE void Store(BFloat16* p, F32 x) {
    U32 bits = (U32)x;
    bits += 0x7fffu + ((bits >> 16) & 1u);
    const U16 half = __builtin_convertvector(bits >> 16, U16);
    std::memcpy(p, &half, sizeof half);
}

// The first n < kLanes elements, and `rest` after them.
template <typename T>
ELLE_INLINE F32 LoadTail(const T* p, int n, float rest) {
    T buffer[kLanes] = {};
    std::memcpy(static_cast<void*>(buffer), p, n * sizeof(T));
    const I32 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return Choose(lane < n, Load(buffer), Fill(rest));
}

template <typename T>
ELLE_INLINE void StoreTail(T* p, F32 x, int n) {
    T buffer[kLanes];
    Store(buffer, x);
    std::memcpy(static_cast<void*>(p), buffer, n * sizeof(T));
}

ELLE_INLINE float Sum(F32 x) {
    float lanes[kLanes];
    Store(lanes, x);
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}

ELLE_INLINE float Top(F32 x) {
    float lanes[kLanes];
    Store(lanes, x);
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
    return lanes[0];
}

// e^x to 2e-7 relative; 0 below -87, e^88 above 88. After Cephes (range reduction by ln 2 in two parts).
ELLE_INLINE F32 Exp(F32 x) {
    x = Choose(x > 88.0f, Fill(88.0f), x);
    const I32 tiny = x < -87.0f;
    x = Choose(tiny, Fill(0.0f), x);
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
    const F32 shifted = x * 1.44269504088896341f + 12582912.0f;
    const F32 n = shifted - 12582912.0f;
    const F32 r = x - n * 0.693359375f - n * -2.12194440e-4f;
    F32 y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    const I32 power = ((I32)shifted << 23) + (I32)y;
    return Choose(tiny, Fill(0.0f), (F32)power);
}

}  // namespace elle_mp
