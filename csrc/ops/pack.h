// Brings rows of a tensor into the forms that Gemm wants, padded with zeros:
//   natural      row after row: a left operand that sums over dim, or over queries
//   interleaved  units of two neighbouring rows: an operand that sums over rows (natural, where a unit is one
//   float) transposed   unit by unit of 64 rows: a right operand that sums over dim
#pragma once

#include "gemm.h"

namespace elle_mp {
namespace ELLE_LEVEL {

ELLE_INLINE int64_t RoundUp(int64_t x) { return (x + kGroup - 1) / kGroup * kGroup; }

template <typename T>
ELLE_INLINE const T* RowOf(const Rows& rows, int64_t sample, int64_t head, int64_t row) {
    return static_cast<const T*>(rows.data) + sample * rows.batch + row * rows.row + rows.heads[head];
}

ELLE_INLINE void CopyRow(const float* from, float* to, int64_t dim) {
    std::memcpy(static_cast<void*>(to), from, dim * sizeof(float));
}
ELLE_INLINE void CopyRow(const BFloat16* from, BFloat16* to, int64_t dim) {
    std::memcpy(static_cast<void*>(to), from, dim * sizeof(BFloat16));
}
ELLE_INLINE void CopyRow(const BFloat16* from, float* to, int64_t dim) {
    int64_t d = 0;
    for (; d + kWidth <= dim; d += kWidth) Store(to + d, Load(from + d));
    for (; d < dim; ++d) to[d] = ToFloat(from[d]);
}

// `rows` rows, and zeros up to `padded`; returns what the rows are as floats in memory.
template <typename T, typename E>
ELLE_INLINE void PackNatural(const T* from, int64_t row, int64_t rows, int64_t padded, int64_t dim, E* to) {
    const int64_t wide = RoundUp(dim);
    for (int64_t r = 0; r < rows; ++r) {
        CopyRow(from + r * row, to + r * wide, dim);
        if (wide > dim) std::memset(static_cast<void*>(to + r * wide + dim), 0, (wide - dim) * sizeof(E));
    }
    std::memset(static_cast<void*>(to + rows * wide), 0, (padded - rows) * wide * sizeof(E));
}

#if defined(ELLE_BF16)
ELLE_INLINE void Interleave(const BFloat16* natural, int64_t rows, int64_t wide, float* to) {
    for (int64_t r = 0; r < rows; r += 2)
        for (int64_t d = 0; d < wide; d += kWidth) {
            const Bits even = __builtin_convertvector(LoadAs<Half>(natural + r * wide + d), Bits);
            const Bits odd = __builtin_convertvector(LoadAs<Half>(natural + (r + 1) * wide + d), Bits);
            Store(to + r / 2 * wide + d, (Vec)(even | (odd << 16)));
        }
}
#endif

// 64 rows of `units` units. Reads up to 16 units past the end, and writes RoundUp(units) rows.
ELLE_INLINE void Transpose(const float* natural, int64_t units, float* to) {
    for (int64_t r = 0; r < kBlockQueries; r += kGroup)
        for (int64_t u = 0; u < units; u += kGroup)
            Transpose16(natural + r * units + u, units, to + u * kBlockQueries + r, kBlockQueries);
}

ELLE_INLINE void StoreRow(const float* from, float* to, int64_t dim) { CopyRow(from, to, dim); }
ELLE_INLINE void StoreRow(const float* from, BFloat16* to, int64_t dim) {
    int64_t d = 0;
    for (; d + kWidth <= dim; d += kWidth) Store(to + d, Load(from + d));
    for (; d < dim; ++d) FromFloat(to + d, from[d]);
}

// Writes columns first to first + count of sums [RoundUp(dim), 64] as rows, each column times its factor.
template <typename T>
ELLE_INLINE void StoreColumns(float* sums, const float* factors, int64_t count, int64_t dim,
                              const OutRows& out, int64_t sample, int64_t head, int64_t first,
                              float* buffer) {
    const int64_t wide = RoundUp(dim);
    T* to = static_cast<T*>(out.data) + sample * out.batch + first * out.row + out.heads[head];
    for (int64_t c = 0; c < count; c += kGroup) {
        for (int64_t d = 0; d < wide; ++d)
            for (int v = 0; v < kVecs; ++v) {
                float* at = sums + d * kBlockQueries + c + v * kWidth;
                Store(at, Load(at) * Load(factors + c + v * kWidth));
            }
        for (int64_t d = 0; d < wide; d += kGroup)
            Transpose16(sums + d * kBlockQueries + c, kBlockQueries, buffer + d, wide);
        const int64_t some = count - c < kGroup ? count - c : kGroup;
        for (int64_t r = 0; r < some; ++r) StoreRow(buffer + r * wide, to + (c + r) * out.row, dim);
    }
}

}  // namespace ELLE_LEVEL
}  // namespace elle_mp
