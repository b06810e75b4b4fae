// The one matrix product of the kernels, on operands that lie in the cache.
//
// Operands are made of 32-bit units: one float, or a pair of bfloat16 that are neighbours in the summed dim.
// A level with other tiles (AMX) replaces Gemm and the packing of pack.h for its unit type.
#pragma once

#include "vectors.h"

namespace elle_mp {
namespace ELLE_LEVEL {

struct Floats {
    typedef float Element;
    static constexpr int kUnit = 1;
    static constexpr bool kPrecise = true;
    static ELLE_INLINE Vec MulAdd(Vec sum, Vec a, Vec b) { return a * b + sum; }
};

#if defined(ELLE_BF16)
struct Pairs {
    typedef BFloat16 Element;
    static constexpr int kUnit = 2;
    static constexpr bool kPrecise = false;
    static ELLE_INLINE Vec MulAdd(Vec sum, Vec a, Vec b) {
        return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    }
    // Both rows rounded: 16 of the even one, then 16 of the odd one.
    static ELLE_INLINE __m512i Round(Vec even, Vec odd) {
        return (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    }
    static ELLE_INLINE void StoreRows(float* even, int64_t row, __m512i rounded) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(even), _mm512_castsi512_si256(rounded));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(even + row), _mm512_extracti64x4_epi64(rounded, 1));
    }
    static ELLE_INLINE void StoreUnits(float* to, __m512i rounded) {
        const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                               23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, rounded));
    }
    static ELLE_INLINE void StoreInterleaved(float* to, Vec even, Vec odd) {
        StoreUnits(to, Round(even, odd));
    }
};
#endif

// The left operand: unit (m, k) is at m * row + k * step.
struct Left {
    const float* data;
    int64_t row, step;
};

// The right operand: row k has its columns side by side.
struct Right {
    const float* data;
    int64_t row;
};

struct Sums {
    float* data;
    int64_t row;
};

// What becomes of the sums that were there.
enum class Into { kNothing, kAdd, kScaledAdd };

// kRows x (16 kGroups) sums in registers.
template <typename Unit, int kRows, int kGroups>
ELLE_INLINE void Tile(int64_t count, Left a, Right b, Sums c, Into into, const float* factors) {
    constexpr int kColumns = kGroups * kVecs;
    Vec sums[kRows][kColumns];
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < kColumns; ++n) sums[m][n] = Vec{};
    const float* left = a.data;
    const float* right = b.data;
    for (int64_t k = 0; k < count; ++k) {
        Vec columns[kColumns];
#pragma GCC unroll 8
        for (int n = 0; n < kColumns; ++n) columns[n] = Load(right + n * kWidth);
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m) {
            const Vec value = Fill(left[m * a.row]);
#pragma GCC unroll 8
            for (int n = 0; n < kColumns; ++n) sums[m][n] = Unit::MulAdd(sums[m][n], value, columns[n]);
        }
        left += a.step;
        right += b.row;
    }
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < kColumns; ++n) {
            float* to = c.data + m * c.row + n * kWidth;
            Vec sum = sums[m][n];
            if (into == Into::kAdd) sum += Load(to);
            if (into == Into::kScaledAdd) sum += Load(to) * Load(factors + n * kWidth);
            Store(to, sum);
        }
}

template <typename Unit, int kRows, int kGroups>
ELLE_INLINE void TileRows(int64_t& rows, int64_t count, Left& a, Right b, Sums& c, Into into,
                          const float* factors) {
    Tile<Unit, kRows, kGroups>(count, a, b, c, into, factors);
    a.data += kRows * a.row;
    c.data += kRows * c.row;
    rows -= kRows;
}

// c = (what `into` says) + a b, for `rows` rows (a multiple of 16), 16 `groups` columns and `count` summed
// units. `factors` has one number for each column.
template <typename Unit>
ELLE_NOINLINE void Gemm(int64_t rows, int64_t groups, int64_t count, Left a, Right b, Sums c, Into into,
                        const float* factors = nullptr) {
#if defined(ELLE_AVX512)
    // The tiles leave 24 of the 32 registers to sums, or 16 where loads then would be what takes the time.
    constexpr int64_t kMost = 4;
#else
    constexpr int64_t kMost = 1;
#endif
    while (groups > 0) {
        const int64_t tile = groups < kMost ? groups : kMost;
        Left a_rest = a;
        Sums c_rest = c;
        int64_t left = rows;
        switch (tile) {
#if defined(ELLE_AVX512)
            case 4:
                while (left % 6 != 0) TileRows<Unit, 4, 4>(left, count, a_rest, b, c_rest, into, factors);
                while (left > 0) TileRows<Unit, 6, 4>(left, count, a_rest, b, c_rest, into, factors);
                break;
            case 3:
                while (left > 0) TileRows<Unit, 8, 3>(left, count, a_rest, b, c_rest, into, factors);
                break;
            case 2:
                while (left > 0) TileRows<Unit, 8, 2>(left, count, a_rest, b, c_rest, into, factors);
                break;
            default:
                while (left > 0) TileRows<Unit, 16, 1>(left, count, a_rest, b, c_rest, into, factors);
#else
            default:
                // 8 of 16 registers (AVX2: two to a row) or all of them hold sums.
                while (left > 0)
                    TileRows<Unit, kWidth == 8 ? 4 : 2, 1>(left, count, a_rest, b, c_rest, into, factors);
#endif
        }
        groups -= tile;
        b.data += tile * kGroup;
        c.data += tile * kGroup;
        if (factors) factors += tile * kGroup;
    }
}

}  // namespace ELLE_LEVEL
}  // namespace elle_mp
