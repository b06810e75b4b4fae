// What the kernels of attention share: tiles in shared memory, operands of tensor-core products, and which
// keys a tile of queries sees.
#pragma once

#include <cmath>
#include <type_traits>

#include "attention.h"
#include "masks.cuh"

namespace elle_mp {

constexpr int kAttentionThreads = 128;
constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.693147180559945309417f;

// Whether any query of a tile sees any of the keys from `begin` on, kTile of them, and whether all see all.
ELLE_DEVICE bool SeesAny(const Summary& x, int begin) {
    return begin < x.prefix_most || (begin < x.end_most && begin + kTile > x.begin_least);
}
ELLE_DEVICE bool SeesAll(const Summary& x, int begin) {
    const int end = begin + kTile;
    return end <= x.prefix_least || (x.begin_most <= begin && end <= x.end_least);
}
// What two neighbouring tiles of queries see together.
ELLE_DEVICE Summary Join(const Summary& x, const Summary& y) {
    return {Smaller(x.prefix_least, y.prefix_least), Bigger(x.prefix_most, y.prefix_most),
            Smaller(x.begin_least, y.begin_least),   Bigger(x.begin_most, y.begin_most),
            Smaller(x.end_least, y.end_least),       Bigger(x.end_most, y.end_most)};
}
// The first tile of keys from `tile` on that is seen, or one behind all.
ELLE_DEVICE int NextTile(const Summary& x, int tile, int tiles) {
    if (tile * kTile < x.prefix_most) return tile;
    tile = Bigger(tile, x.begin_least / kTile);
    return tile * kTile < x.end_most ? tile : tiles;
}

ELLE_DEVICE MaskKey QueryKey(const Attention& work, int sample, int head, int query) {
    return RowKey(work.sample_keys[sample], (work.first_head + head) * work.keys + work.positions[query]);
}

// What one query sees.
struct Seen {
    int prefix, begin, end;

    ELLE_METHOD bool operator()(int key) const { return key < prefix || (key >= begin && key < end); }
};

ELLE_DEVICE Seen SeenBy(const Attention& work, int sample, int query) {
    if (query >= work.queries) return {0, 0, 0};
    const int32_t* x = work.seen + (static_cast<int64_t>(sample) * work.queries + query) * 3;
    // What is before the first key or behind the last is not there.
    return {Smaller(x[0], work.keys), Bigger(x[1], 0), Smaller(x[2], work.keys)};
}

// The logarithm to the base 2 that weights are made with again; infinite where there are none.
ELLE_DEVICE float LogSumOf(const Attention& work, int64_t row) {
    const float lse = work.lse[row];
    return lse == -INFINITY ? INFINITY : lse * kLog2E;
}

// Where 8 elements of a tile [rows, kDim] lie: chunks are exchanged within a row, so that eight rows of one
// column are in different banks.
template <int kDim>
ELLE_DEVICE int ChunkAt(int row, int chunk) {
    return row * kDim + ((chunk ^ (row & 7)) << 3);
}

// Copies rows to a tile, zeros behind the last row and column; asynchronously where rows are aligned.
template <typename T, int kDim, int kRows>
ELLE_DEVICE void LoadTile(T* to, const T* from, const HeadRows& rows, int count, int dim) {
    constexpr int kChunks = kDim / 8;
    ELLE_UNROLL
    for (int i = 0; i < kRows * kChunks / kAttentionThreads; ++i) {
        const int c = i * kAttentionThreads + ThreadIndex(), row = c / kChunks, chunk = c % kChunks;
        T* target = to + ChunkAt<kDim>(row, chunk);
        const T* source = from + row * rows.row + chunk * 8;
        if (rows.aligned) {
            const bool valid = row < count && chunk * 8 < dim;
            CopyAsync(target, valid ? source : from, valid);
        } else {
            for (int e = 0; e < 8; ++e) target[e] = row < count && chunk * 8 + e < dim ? source[e] : T{};
        }
    }
}

// Operand A: rows `row` to row + 15 of a tile, columns 16 step to 16 step + 15.
template <typename T, int kDim>
ELLE_DEVICE void LoadA(uint32_t (&a)[4], const T* tile, int row, int step) {
    const int lane = ThreadIndex() % kWarp;
    LoadMatrices(a, tile + ChunkAt<kDim>(row + (lane & 15), 2 * step + (lane >> 4)));
}
// Operands B of two products: columns are rows `row` to row + 7, and row + 8 to row + 15, of a tile; what is
// summed over are its columns 16 step to 16 step + 15.
template <typename T, int kDim>
ELLE_DEVICE void LoadB(uint32_t (&b)[4], const T* tile, int row, int step) {
    const int lane = ThreadIndex() % kWarp;
    LoadMatrices(b, tile + ChunkAt<kDim>(row + (lane & 7) + (lane >> 4) * 8, 2 * step + (lane >> 3 & 1)));
}
// The same where what is summed over are rows `row` to row + 15, and columns are the tile's: 16 step to 16
// step
// + 7, and those behind.
template <typename T, int kDim>
ELLE_DEVICE void LoadBTransposed(uint32_t (&b)[4], const T* tile, int row, int step) {
    const int lane = ThreadIndex() % kWarp;
    LoadMatricesTransposed(b, tile + ChunkAt<kDim>(row + (lane & 15), 2 * step + (lane >> 4)));
}

// c += a b^T: a is kGroups times 16 rows of one tile, from `row` on, b the rows of another; both [.., kDim].
template <typename T, int kDim, int kColumns, int kGroups>
ELLE_DEVICE void MultiplyRows(float (&c)[kGroups][kColumns / 8][4], const T* a_tile, int row,
                              const T* b_tile) {
    ELLE_UNROLL
    for (int step = 0; step < kDim / 16; ++step) {
        uint32_t a[kGroups][4];
        ELLE_UNROLL
        for (int g = 0; g < kGroups; ++g) LoadA<T, kDim>(a[g], a_tile, row + 16 * g, step);
        ELLE_UNROLL
        for (int n = 0; n < kColumns / 16; ++n) {
            uint32_t b[4];
            LoadB<T, kDim>(b, b_tile, n * 16, step);
            ELLE_UNROLL
            for (int g = 0; g < kGroups; ++g) {
                Mma(T{}, c[g][2 * n], a[g], b[0], b[1]);
                Mma(T{}, c[g][2 * n + 1], a[g], b[2], b[3]);
            }
        }
    }
}

// c += x b: x are results [16, kSummed] of the products above, rounded, b a tile [kSummed, kDim].
template <typename T, int kDim, int kSummed, int kGroups>
ELLE_DEVICE void MultiplyResult(float (&c)[kGroups][kDim / 8][4], const float (&x)[kGroups][kSummed / 8][4],
                                const T* b_tile) {
    ELLE_UNROLL
    for (int step = 0; step < kSummed / 16; ++step) {
        uint32_t a[kGroups][4];
        ELLE_UNROLL
        for (int g = 0; g < kGroups; ++g) {
            ELLE_UNROLL
            for (int i = 0; i < 4; ++i) {
                const float (&from)[4] = x[g][2 * step + i / 2];
                a[g][i] = Pair<T>(from[i % 2 * 2], from[i % 2 * 2 + 1]);
            }
        }
        ELLE_UNROLL
        for (int n = 0; n < kDim / 16; ++n) {
            uint32_t b[4];
            LoadBTransposed<T, kDim>(b, b_tile, step * 16, n);
            ELLE_UNROLL
            for (int g = 0; g < kGroups; ++g) {
                Mma(T{}, c[g][2 * n], a[g], b[0], b[1]);
                Mma(T{}, c[g][2 * n + 1], a[g], b[2], b[3]);
            }
        }
    }
}

template <int kGroups, int kCount>
ELLE_DEVICE void Clear(float (&c)[kGroups][kCount][4]) {
    ELLE_UNROLL
    for (int g = 0; g < kGroups; ++g) {
        ELLE_UNROLL
        for (int n = 0; n < kCount; ++n) {
            ELLE_UNROLL
            for (int i = 0; i < 4; ++i) c[g][n][i] = 0.0f;
        }
    }
}

// Writes a warp's result, 16 rows from `first` on; lane l has rows l / 4 and l / 4 + 8, which `factor` is
// for.
template <typename T, int kDim>
ELLE_DEVICE void StoreRows(const float (&c)[kDim / 8][4], const float (&factor)[2], T* to, int64_t stride,
                           int first, int rows, int dim) {
    const int lane = ThreadIndex() % kWarp;
    ELLE_UNROLL
    for (int half = 0; half < 2; ++half) {
        const int row = first + lane / 4 + 8 * half;
        if (row >= rows) continue;
        T* out = to + row * stride;
        ELLE_UNROLL
        for (int n = 0; n < kDim / 8; ++n) {
            const int column = n * 8 + lane % 4 * 2;
            const float x = c[n][2 * half] * factor[half], y = c[n][2 * half + 1] * factor[half];
            if (column + 1 < dim && dim % 2 == 0) {
                const uint32_t both = Pair<T>(x, y);
                memcpy(out + column, &both, sizeof both);
            } else {
                if (column < dim) out[column] = FromFloat<T>(x);
                if (column + 1 < dim) out[column + 1] = FromFloat<T>(y);
            }
        }
    }
}

// Calls f(T{}, width, drop) with the kernels' compile-time choices.
template <typename F>
const char* ChooseKernel(const Attention& work, Element type, const F& f) {
#ifdef ELLE_FEW_KERNELS
    return type == Element::kBFloat16 ? f(Bf16{}, std::integral_constant<int, 128>{}, std::true_type{})
                                      : "not built";
#else
    const auto with_width = [&](auto element, auto width) {
        return work.threshold == 0 ? f(element, width, std::false_type{})
                                   : f(element, width, std::true_type{});
    };
    const auto with_type = [&](auto element) {
        return work.dim <= 64 ? with_width(element, std::integral_constant<int, 64>{})
                              : with_width(element, std::integral_constant<int, 128>{});
    };
    return type == Element::kBFloat16 ? with_type(Bf16{}) : with_type(Fp16{});
#endif
}

}  // namespace elle_mp
