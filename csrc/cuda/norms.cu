#include <type_traits>

#include "masks.cuh"
#include "norms.h"
#include "rows.cuh"

namespace elle_mp {
namespace {

constexpr int kMostThreads = 256;
constexpr int kSumColumns = 32, kSumParts = 8;

// Calls f(column, count) for the columns that are this thread's: always the same ones.
template <typename T, typename F>
ELLE_DEVICE void ForColumns(const NormRows& work, const F& f) {
    if (work.aligned) {
        constexpr int kCount = Chunk<T>::kCount;
        for (int64_t c = ThreadIndex() * kCount; c < work.columns; c += BlockSize() * kCount)
            f(c, std::integral_constant<int, kCount>{});
    } else {
        for (int64_t c = ThreadIndex(); c < work.columns; c += BlockSize())
            f(c, std::integral_constant<int, 1>{});
    }
}

ELLE_DEVICE MaskKey KeyOf(const NormRows& work, int64_t row) {
    return work.threshold ? RowKey(work.keys[row / work.run], work.first_row + row % work.run) : MaskKey{};
}

// Elements of a row from `column` on, dropped and scaled, each rounded as if it had been stored.
template <typename T, int kCount>
ELLE_DEVICE void DropSome(const NormRows& work, const MaskKey& key, int64_t column, float (&x)[kCount]) {
    uint32_t word = 0;
    ELLE_UNROLL
    for (int i = 0; i < kCount; ++i) {
        if (i % 2 == 0) word = MaskWord(key, static_cast<uint32_t>((column + i) / 2));
        x[i] = Kept(word, column + i, work.threshold) ? ToFloat(Narrow<T>(Product(x[i], work.keep_scale)))
                                                      : 0.0f;
    }
}

// A block for each row; the row waits in shared memory, each thread's columns for itself.
template <typename T>
ELLE_KERNEL(kMostThreads)
Forward(NormRows work) {
    ELLE_SHARED float scratch[2 * kWarp];
    float* values = reinterpret_cast<float*>(SharedMemory());
    const int64_t row = BlockX(), at = row * work.columns;
    const T* x = static_cast<const T*>(work.x) + at;
    const MaskKey key = KeyOf(work, row);
    const float even = 1.0f / static_cast<float>(work.columns);
    const auto share = [&](int64_t c) { return work.stat_weights ? work.stat_weights[c] : even; };
    float sum[1] = {0.0f};
    ForColumns<T>(work, [&](int64_t c, auto count) {
        constexpr int kCount = decltype(count)::value;
        float h[kCount];
        LoadSome(x + c, h);
        if (work.threshold) DropSome<T>(work, key, c, h);
        if (work.residual) {
            float residual[kCount];
            LoadSome(static_cast<const T*>(work.residual) + at + c, residual);
            ELLE_UNROLL
            for (int i = 0; i < kCount; ++i) h[i] = ToFloat(Narrow<T>(Total(h[i], residual[i])));
        }
        if (work.h) StoreSome(static_cast<T*>(work.h) + at + c, h);
        ELLE_UNROLL
        for (int i = 0; i < kCount; ++i) {
            values[c + i] = h[i];
            if (!work.rms) sum[0] += share(c + i) * h[i];
        }
    });
    BlockSums(sum, scratch);
    const float mean = work.rms ? 0.0f : sum[0];
    float squares[1] = {0.0f};
    ForColumns<T>(work, [&](int64_t c, auto count) {
        for (int i = 0; i < decltype(count)::value; ++i) {
            const float centred = values[c + i] - mean;
            squares[0] += share(c + i) * centred * centred;
        }
    });
    BlockSums(squares, scratch + kWarp);
    const float rstd = Rsqrt(squares[0] + work.eps);
    if (ThreadIndex() == 0) {
        work.mean[row] = mean;
        work.rstd[row] = rstd;
    }
    ForColumns<T>(work, [&](int64_t c, auto count) {
        constexpr int kCount = decltype(count)::value;
        float y[kCount];
        ELLE_UNROLL
        for (int i = 0; i < kCount; ++i) {
            y[i] = (values[c + i] - mean) * rstd * work.weight[c + i];
            if (work.bias) y[i] += work.bias[c + i];
        }
        StoreSome(static_cast<T*>(work.y) + at + c, y);
    });
}

// A block for some rows, whose parts of the gradients of weight and bias it sums in shared memory, each
// thread its own columns.
template <typename T>
ELLE_KERNEL(kMostThreads)
Backward(NormRows work) {
    ELLE_SHARED float scratch[4 * kWarp];
    float* d_weight = reinterpret_cast<float*>(SharedMemory());
    float* d_bias = d_weight + work.columns;
    for (int64_t c = ThreadIndex(); c < 2 * work.columns; c += BlockSize()) d_weight[c] = 0.0f;
    SyncThreads();
    const float even = 1.0f / static_cast<float>(work.columns);
    const int64_t first = BlockX() * work.rows_in_block;
    const int64_t end = first + work.rows_in_block < work.rows ? first + work.rows_in_block : work.rows;
    for (int64_t row = first; row < end; ++row) {
        const int64_t at = row * work.columns;
        const T* h = static_cast<const T*>(work.kept) + at;
        const T* dy = static_cast<const T*>(work.dy) + at;
        const float mean = work.mean[row], rstd = work.rstd[row];
        float sums[2] = {0.0f, 0.0f};  // of dn n and dn, with n the norm and dn its gradient
        ForColumns<T>(work, [&](int64_t c, auto count) {
            constexpr int kCount = decltype(count)::value;
            float n[kCount], dn[kCount];
            LoadSome(h + c, n);
            LoadSome(dy + c, dn);
            ELLE_UNROLL
            for (int i = 0; i < kCount; ++i) {
                n[i] = (n[i] - mean) * rstd;
                d_weight[c + i] += dn[i] * n[i];
                d_bias[c + i] += dn[i];
                dn[i] *= work.weight[c + i];
                sums[0] += dn[i] * n[i];
                sums[1] += dn[i];
            }
        });
        // Two places in turns: a thread may begin the next row while others still read this one's sums.
        BlockSums(sums, scratch + (row & 1) * 2 * kWarp);
        const float along = sums[0], total = work.rms ? 0.0f : sums[1];
        const MaskKey key = KeyOf(work, row);
        ForColumns<T>(work, [&](int64_t c, auto count) {
            constexpr int kCount = decltype(count)::value;
            float n[kCount], dx[kCount], dh[kCount] = {};
            LoadSome(h + c, n);
            LoadSome(dy + c, dx);
            if (work.dh) LoadSome(static_cast<const T*>(work.dh) + at + c, dh);
            ELLE_UNROLL
            for (int i = 0; i < kCount; ++i) {
                n[i] = (n[i] - mean) * rstd;
                const float share = work.stat_weights ? work.stat_weights[c + i] : even;
                dx[i] = (dx[i] * work.weight[c + i] - share * (n[i] * along + total)) * rstd;
                if (work.dh) dx[i] = ToFloat(Narrow<T>(dx[i])) + dh[i];
                dx[i] = ToFloat(Narrow<T>(dx[i]));
            }
            StoreSome(static_cast<T*>(work.d_residual) + at + c, dx);
            if (work.d_x) {
                DropSome<T>(work, key, c, dx);
                StoreSome(static_cast<T*>(work.d_x) + at + c, dx);
            }
        });
    }
    SyncThreads();
    float* part = work.parts + static_cast<int64_t>(BlockX()) * 2 * work.columns;
    for (int64_t c = ThreadIndex(); c < 2 * work.columns; c += BlockSize()) part[c] = d_weight[c];
}

// The sum over blocks of their parts: 32 columns to a block, eight threads for each.
ELLE_KERNEL(kSumColumns* kSumParts)
SumParts(NormRows work) {
    ELLE_SHARED float scratch[kSumParts][kSumColumns];
    const int lane = ThreadIndex() % kSumColumns, part = ThreadIndex() / kSumColumns;
    const int64_t column = static_cast<int64_t>(BlockX()) * kSumColumns + lane;
    float sum = 0.0f;
    if (column < 2 * work.columns)
        for (int64_t b = part; b < work.blocks; b += kSumParts)
            sum += work.parts[b * 2 * work.columns + column];
    scratch[part][lane] = sum;
    SyncThreads();
    if (part != 0 || column >= 2 * work.columns) return;
    for (int p = 1; p < kSumParts; ++p) sum += scratch[p][lane];
    work.sums[column] = sum;
}

// Whole warps, about one chunk to a thread.
int ThreadsFor(int64_t columns, int64_t element) {
    const int64_t chunks = (columns * element + 15) / 16, threads = (chunks + kWarp - 1) / kWarp * kWarp;
    return static_cast<int>(threads < kWarp ? kWarp : threads > kMostThreads ? kMostThreads : threads);
}

}  // namespace

const char* RunAddNorm(const NormRows& work, Element type, void* stream) {
    return WithFloatElement(type, [&](auto element) {
        const int64_t shared = work.columns * static_cast<int64_t>(sizeof(float));
        return Launch(Forward<decltype(element)>, {work.rows, 1, 1}, ThreadsFor(work.columns, sizeof element),
                      shared, stream, work);
    });
}

const char* RunAddNormBackward(const NormRows& work, Element type, void* stream) {
    const char* error = WithFloatElement(type, [&](auto element) {
        const int64_t shared = 2 * work.columns * static_cast<int64_t>(sizeof(float));
        return Launch(Backward<decltype(element)>, {work.blocks, 1, 1},
                      ThreadsFor(work.columns, sizeof element), shared, stream, work);
    });
    if (error) return error;
    const Grid grid{(2 * work.columns + kSumColumns - 1) / kSumColumns, 1, 1};
    return Launch(SumParts, grid, kSumColumns * kSumParts, 0, stream, work);
}

}  // namespace elle_mp
