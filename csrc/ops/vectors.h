// Vectors of one instruction level. A file that includes this defines ELLE_LEVEL (a namespace), ELLE_TARGET
// (the function attribute that turns the instructions on), ELLE_WIDTH (floats to a register), and, where they
// are there, ELLE_AVX512 and ELLE_BF16. Every function here and in the kernels carries the attribute, so that
// nothing compiled for a level can be linked into code that runs on other machines.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(ELLE_AVX512)
#include <immintrin.h>
#endif

#include "problem.h"

#define ELLE_INLINE inline __attribute__((always_inline)) ELLE_TARGET
#define ELLE_NOINLINE __attribute__((noinline)) ELLE_TARGET

#if defined(__GNUC__) && !defined(__clang__)
// Vectors are passed between inlined functions only, so their calling convention is of no interest.
#pragma GCC diagnostic ignored "-Wpsabi"
// GCC's own headers start undefined vectors with themselves (its bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace elle_mp {
namespace ELLE_LEVEL {

constexpr int kWidth = ELLE_WIDTH;
// Registers to a group of 16 lanes.
constexpr int kVecs = static_cast<int>(kGroup) / kWidth;
constexpr float kLowest = -__builtin_inff();
constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

typedef float Vec __attribute__((vector_size(ELLE_WIDTH * 4)));
typedef int32_t Int __attribute__((vector_size(ELLE_WIDTH * 4)));
typedef uint32_t Bits __attribute__((vector_size(ELLE_WIDTH * 4)));
typedef uint16_t Half __attribute__((vector_size(ELLE_WIDTH * 2)));

// A bfloat16 as its bits.
struct BFloat16 {
    uint16_t bits;
};

template <typename V, typename T>
ELLE_INLINE V LoadAs(const T* p) {
    V x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
ELLE_INLINE float ToFloat(float x) { return x; }
ELLE_INLINE float ToFloat(BFloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
}
ELLE_INLINE Vec Load(const float* p) { return LoadAs<Vec>(p); }
ELLE_INLINE Vec Load(const BFloat16* p) {
    return (Vec)(__builtin_convertvector(LoadAs<Half>(p), Bits) << 16);
}
// The first `lanes` of a register; `rest` in the others.
template <typename T>
ELLE_INLINE Vec LoadTail(const T* p, int lanes, float rest) {
    float values[kWidth];
    for (int i = 0; i < kWidth; ++i) values[i] = i < lanes ? ToFloat(p[i]) : rest;
    return Load(values);
}
ELLE_INLINE Int LoadInt(const int32_t* p) { return LoadAs<Int>(p); }
ELLE_INLINE void Store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }
// Rounds to nearest even; a NaN stays one.
ELLE_INLINE void Store(BFloat16* p, Vec x) {
#if defined(ELLE_BF16)
    const __m256bh half = _mm512_cvtneps_pbh((__m512)x);
    std::memcpy(static_cast<void*>(p), &half, sizeof half);
#else
    Bits bits = (Bits)x;
    const Bits nan = (Bits)(x != x);
    bits = ((bits + 0x7fffu + ((bits >> 16) & 1u)) & ~nan) | (0x7fc00000u & nan);
    const Half half = __builtin_convertvector(bits >> 16, Half);
    std::memcpy(static_cast<void*>(p), &half, sizeof half);
#endif
}

ELLE_INLINE void FromFloat(float* p, float x) { *p = x; }
ELLE_INLINE void FromFloat(BFloat16* p, float x) {
    BFloat16 lanes[kWidth];
    Store(lanes, Vec{} + x);
    *p = lanes[0];
}

template <typename T>
ELLE_INLINE void StoreTail(T* p, Vec x, int lanes) {
    T values[kWidth];
    Store(values, x);
    for (int i = 0; i < lanes; ++i) p[i] = values[i];
}

ELLE_INLINE Vec Fill(float x) { return Vec{} + x; }
ELLE_INLINE Vec Choose(Int mask, Vec yes, Vec no) { return mask ? yes : no; }
// The second where one of them is a NaN.
ELLE_INLINE Vec Max(Vec a, Vec b) {
#if defined(ELLE_AVX512)
    return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return a > b ? a : b;
#endif
}

ELLE_INLINE float Sum(Vec x) {
    float lanes[kWidth];
    Store(lanes, x);
    for (int half = kWidth / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}

// 2^x; 0 below -126 or less, a NaN stays one. The polynomials are least in their largest relative error
// with p(0) = 1: 1.1e-7 of the fifth degree, 3e-6 of the fourth, which bfloat16 weights are content with.
template <bool kPrecise>
ELLE_INLINE Vec Exp2(Vec x) {
#if defined(ELLE_AVX512)
    x = Max(Fill(-150.0f), x);
    const Vec n = (Vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const Int tiny = x < -126.0f;
    x = Choose(tiny, Fill(0.0f), x);
    x = Choose(x > 127.0f, Fill(127.0f), x);
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
    const Vec shifted = x + 12582912.0f;
    const Vec n = shifted - 12582912.0f;
#endif
    const Vec r = x - n;
    Vec y;
    if (kPrecise) {
        y = r * 0.001326472731307149f + 0.009671512991189957f;
        y = y * r + 0.05550733581185341f;
        y = y * r + 0.24022242426872253f;
        y = y * r + 0.6931470036506653f;
    } else {
        y = r * 0.009582852944731712f + 0.055906426161527634f;
        y = y * r + 0.24024099111557007f;
        y = y * r + 0.6931241750717163f;
    }
    y = y * r + 1.0f;
#if defined(ELLE_AVX512)
    return (Vec)_mm512_scalef_ps((__m512)y, (__m512)n);
#else
    return Choose(tiny, Fill(0.0f), (Vec)((Int)y + ((Int)shifted << 23)));
#endif
}

// to[column][row] = from[row][column] for 16 x 16 words of 32 bits.
ELLE_INLINE void Transpose16(const float* from, int64_t from_row, float* to, int64_t to_row) {
#if defined(ELLE_AVX512)
    __m512 a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(from + i * from_row);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    // Now 4 x 4 blocks: a[4 i + j] has column 4 l + j of rows 4 i to 4 i + 3 in its l-th quarter.
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        const __m512d low = (__m512d)b[i], low2 = (__m512d)b[i + 2];
        const __m512d high = (__m512d)b[i + 1], high2 = (__m512d)b[i + 3];
        a[i] = (__m512)_mm512_unpacklo_pd(low, low2);
        a[i + 1] = (__m512)_mm512_unpackhi_pd(low, low2);
        a[i + 2] = (__m512)_mm512_unpacklo_pd(high, high2);
        a[i + 3] = (__m512)_mm512_unpackhi_pd(high, high2);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        const __m512 top = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88);
        const __m512 top2 = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xdd);
        const __m512 end = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88);
        const __m512 end2 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xdd);
        _mm512_storeu_ps(to + j * to_row, _mm512_shuffle_f32x4(top, end, 0x88));
        _mm512_storeu_ps(to + (4 + j) * to_row, _mm512_shuffle_f32x4(top2, end2, 0x88));
        _mm512_storeu_ps(to + (8 + j) * to_row, _mm512_shuffle_f32x4(top, end, 0xdd));
        _mm512_storeu_ps(to + (12 + j) * to_row, _mm512_shuffle_f32x4(top2, end2, 0xdd));
    }
#else
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 16; ++j) to[j * to_row + i] = from[i * from_row + j];
#endif
}

}  // namespace ELLE_LEVEL
}  // namespace elle_mp
