// Normal numbers of philox.h for one instruction level.
//
// Replicas of a weight are drawn on machines of different levels and must have the same bits: nothing here is
// contracted into fused multiply-adds, and all else rounds correctly everywhere.
//
// A counter has four 32-bit words: two pairs of a radius and an angle, and so four numbers (Box and Muller,
// 1958). Sixteen counters make a block of 64 numbers: number k * 16 + l of a block is the k-th of its counter
// l.
#pragma once

#include <algorithm>

#include "vectors.h"

#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#endif

namespace elle_mp {
namespace ELLE_LEVEL {

constexpr int64_t kNormals = 64;

// The high and the low 32 bits of the products with a constant.
ELLE_INLINE Bits HighProduct(Bits x, uint32_t factor) {
#if defined(ELLE_AVX512)
    const __m512i constant = _mm512_set1_epi64(static_cast<int64_t>(factor));
    const __m512i even = _mm512_mul_epu32((__m512i)x, constant);
    const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)x, 32), constant);
    return (Bits)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
#else
    Bits high;
    for (int i = 0; i < kWidth; ++i) high[i] = static_cast<uint32_t>(uint64_t{x[i]} * factor >> 32);
    return high;
#endif
}

// Bits below 2^31 as floats.
ELLE_INLINE Vec FromInt(Int x) { return __builtin_convertvector(x, Vec); }

// sqrt(-2 ln u) with u = (word + 1/2) / 2^32.
ELLE_INLINE Vec Radius(Bits word) {
    // Near 1, where ln u is small, u is taken from above: 1 - u loses nothing. Words have 32 bits, so floats
    // are made of their halves.
    const Bits rest = ~word;
    const Vec u = (FromInt((Int)(word >> 1)) * 2.0f + FromInt((Int)(word & 1u)) + 0.5f) * 0x1p-32f;
    const Vec v = (FromInt((Int)(rest >> 1)) * 2.0f + FromInt((Int)(rest & 1u)) + 0.5f) * 0x1p-32f;
    const Int near = v < 0.25f;
    // u = m 2^e with m in [3/4, 3/2).
    const Int exponent = (Int)((Bits)u - 0x3f400000u) >> 23;
    const Vec m = (Vec)((Bits)u - ((Bits)exponent << 23));
    const Vec f = Choose(near, -v, m - 1.0f);
    const Vec e = Choose(near, Vec{}, FromInt(exponent));
    // ln(1 + f) = 2 atanh(f / (2 + f)).
    const Vec s = f / (f + 2.0f), s2 = s * s;
    Vec p = s2 * (1.0f / 9) + 1.0f / 7;
    p = p * s2 + 1.0f / 5;
    p = p * s2 + 1.0f / 3;
    const Vec half = s + s * s2 * p;
    const Vec square = -2.0f * (e * kLn2 + 2.0f * half);
    Vec root;
    for (int i = 0; i < kWidth; ++i) root[i] = __builtin_sqrtf(square[i]);
    return root;
}

// The cosine and the sine of 2 pi (word + 1/2) / 2^32.
ELLE_INLINE void Turn(Bits word, Vec& cosine, Vec& sine) {
    // A quarter of the circle about each axis.
    const Bits shifted = word + 0x20000000u;
    const Bits quarter = shifted >> 30;
    const Int part = (Int)(shifted & 0x3fffffffu) - 0x20000000;
    const Vec x = FromInt(2 * part + 1) * (0x1p-32f * 3.14159265358979324f), x2 = x * x;
    Vec s = x2 * (1.0f / 362880) - 1.0f / 5040;
    s = s * x2 + 1.0f / 120;
    s = s * x2 - 1.0f / 6;
    s = x + x * x2 * s;
    Vec c = x2 * (-1.0f / 3628800) + 1.0f / 40320;
    c = c * x2 - 1.0f / 720;
    c = c * x2 + 1.0f / 24;
    c = c * x2 - 0.5f;
    c = 1.0f + x2 * c;
    const Int swap = (Int)(quarter & 1u) != 0;
    const Vec first = Choose(swap, s, c), second = Choose(swap, c, s);
    const Bits sign = Bits{} + 0x80000000u;
    cosine = (Vec)((Bits)first ^ (sign & (Bits)((Int)(((quarter + 1u) >> 1) & 1u) != 0)));
    sine = (Vec)((Bits)second ^ (sign & (Bits)((Int)(quarter >> 1) != 0)));
}

// The 64 numbers of block `number` of the stream.
ELLE_INLINE void FillBlock(uint64_t key, uint64_t number, float* out) {
    for (int lane = 0; lane < kGroup; lane += kWidth) {
        const uint64_t counter = number * kGroup + lane;
        Bits x0, x1 = Bits{} + static_cast<uint32_t>(counter >> 32), x2{}, x3{};
        // A block's counters differ in their lowest bits only.
        for (int i = 0; i < kWidth; ++i) x0[i] = static_cast<uint32_t>(counter) + static_cast<uint32_t>(i);
        uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
#pragma GCC unroll 10
        for (int round = 0; round < 10; ++round) {
            const Bits high0 = HighProduct(x0, 0xd2511f53u), high1 = HighProduct(x2, 0xcd9e8d57u);
            const Bits low0 = x0 * 0xd2511f53u, low1 = x2 * 0xcd9e8d57u;
            x0 = high1 ^ x1 ^ key0;
            x1 = low1;
            x2 = high0 ^ x3 ^ key1;
            x3 = low0;
            key0 += 0x9e3779b9u;
            key1 += 0xbb67ae85u;
        }
        Vec cosine, sine, radius = Radius(x0);
        Turn(x1, cosine, sine);
        Store(out + lane, radius * cosine);
        Store(out + kGroup + lane, radius * sine);
        radius = Radius(x2);
        Turn(x3, cosine, sine);
        Store(out + 2 * kGroup + lane, radius * cosine);
        Store(out + 3 * kGroup + lane, radius * sine);
    }
}

// Numbers start to start + count of the stream.
ELLE_NOINLINE void NormalRun(uint64_t key, uint64_t start, int64_t count, float* out) {
    uint64_t block = start / kNormals;
    int64_t skip = static_cast<int64_t>(start % kNormals);
    while (count > 0) {
        const int64_t taken = std::min(kNormals - skip, count);
        if (taken == kNormals) {
            FillBlock(key, block, out);
        } else {
            float numbers[kNormals];
            FillBlock(key, block, numbers);
            std::copy(numbers + skip, numbers + skip + taken, out);
        }
        out += taken;
        count -= taken;
        skip = 0;
        ++block;
    }
}

}  // namespace ELLE_LEVEL
}  // namespace elle_mp

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif
