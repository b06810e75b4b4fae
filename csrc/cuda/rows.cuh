// Rows in memory that the threads of a block share: 16 bytes at a time where addresses allow, and sums over
// the block, always in the same order.
#pragma once

#include <type_traits>

#include "device.cuh"

namespace elle_mp {

template <typename T>
struct alignas(16) Chunk {
    static constexpr int kCount = 16 / static_cast<int>(sizeof(T));
    T x[kCount];
};

// kCount neighbouring elements, as Wide<T>.
template <int kCount, typename T>
ELLE_DEVICE void LoadSome(const T* from, Wide<T> (&to)[kCount]) {
    if constexpr (kCount == 1) {
        to[0] = ToFloat(*from);
    } else {
        const Chunk<T> chunk = *reinterpret_cast<const Chunk<T>*>(from);
        ELLE_UNROLL
        for (int i = 0; i < kCount; ++i) to[i] = ToFloat(chunk.x[i]);
    }
}
template <int kCount, typename T>
ELLE_DEVICE void StoreSome(T* to, const Wide<T> (&from)[kCount]) {
    if constexpr (kCount == 1) {
        *to = Narrow<T>(from[0]);
    } else {
        Chunk<T> chunk;
        ELLE_UNROLL
        for (int i = 0; i < kCount; ++i) chunk.x[i] = Narrow<T>(from[i]);
        *reinterpret_cast<Chunk<T>*>(to) = chunk;
    }
}

ELLE_DEVICE bool IsAligned(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

// Calls f(index, n, values) for neighbouring elements of a row, n of them (a chunk's, or 1), as Wide<T>.
template <typename T, typename F>
ELLE_DEVICE void ReadRow(const T* row, int64_t columns, const F& f) {
    constexpr int kCount = Chunk<T>::kCount;
    const int64_t chunks = IsAligned(row) ? columns / kCount : 0;
    Wide<T> values[kCount];
    for (int64_t i = ThreadIndex(); i < chunks; i += BlockSize()) {
        const Chunk<T> chunk = reinterpret_cast<const Chunk<T>*>(row)[i];
        ELLE_UNROLL
        for (int e = 0; e < kCount; ++e) values[e] = ToFloat(chunk.x[e]);
        f(i * kCount, std::integral_constant<int, kCount>{}, values);
    }
    for (int64_t i = chunks * kCount + ThreadIndex(); i < columns; i += BlockSize()) {
        values[0] = ToFloat(row[i]);
        f(i, std::integral_constant<int, 1>{}, values);
    }
}

// out[i] = f(i, row[i]) for all columns; the two may be the same.
template <typename T, typename F>
ELLE_DEVICE void MapRow(const T* row, T* out, int64_t columns, const F& f) {
    constexpr int kCount = Chunk<T>::kCount;
    const int64_t chunks = IsAligned(row) && IsAligned(out) ? columns / kCount : 0;
    for (int64_t i = ThreadIndex(); i < chunks; i += BlockSize()) {
        Chunk<T> chunk = reinterpret_cast<const Chunk<T>*>(row)[i];
        ELLE_UNROLL
        for (int e = 0; e < kCount; ++e) chunk.x[e] = Narrow<T>(f(i * kCount + e, ToFloat(chunk.x[e])));
        reinterpret_cast<Chunk<T>*>(out)[i] = chunk;
    }
    for (int64_t i = chunks * kCount + ThreadIndex(); i < columns; i += BlockSize())
        out[i] = Narrow<T>(f(i, ToFloat(row[i])));
}

// Sums over all threads of a block, in all of them; `scratch` is shared memory for kCount * 32 elements, free
// again after the next barrier.
template <int kCount, typename T>
ELLE_DEVICE void BlockSums(T (&x)[kCount], T* scratch) {
    const int warp = ThreadIndex() / kWarp, warps = BlockSize() / kWarp;
    ELLE_UNROLL
    for (int n = 0; n < kCount; ++n) {
        x[n] = WarpSum(x[n]);
        if (ThreadIndex() % kWarp == 0) scratch[n * kWarp + warp] = x[n];
    }
    SyncThreads();
    ELLE_UNROLL
    for (int n = 0; n < kCount; ++n) {
        x[n] = T(0);
        for (int w = 0; w < warps; ++w) x[n] += scratch[n * kWarp + w];
    }
}

}  // namespace elle_mp
