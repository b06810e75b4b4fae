#include <type_traits>

#include "embedding.h"
#include "rows.cuh"

namespace elle_mp {
namespace {

constexpr int kThreads = 128;

// The first of the ascending ids that is not below `id`.
ELLE_DEVICE int64_t FirstOf(const TableGradient& work, int64_t id) {
    int64_t low = 0, high = work.count;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (work.ids[middle] < id)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

// Row `row` from `column` on: the sum, in the order in which the rows were looked up.
template <typename T, int kCount>
ELLE_DEVICE void SumRows(const TableGradient& work, int64_t row, int64_t column) {
    const int64_t begin = FirstOf(work, row), end = FirstOf(work, row + 1);
    Wide<T> sum[kCount] = {};
    for (int64_t i = begin; i < end; ++i) {
        const T* from = static_cast<const T*>(work.grad) + work.order[i] * work.columns + column;
        Wide<T> x[kCount];
        LoadSome(from, x);
        ELLE_UNROLL
        for (int e = 0; e < kCount; ++e) sum[e] += x[e];
    }
    StoreSome(static_cast<T*>(work.out) + row * work.columns + column, sum);
}

// A block for some columns of one row of the table.
template <typename T>
ELLE_KERNEL(kThreads)
Gather(TableGradient work) {
    const int64_t place = static_cast<int64_t>(BlockY()) * kThreads + ThreadIndex();
    constexpr int kCount = Chunk<T>::kCount;
    if (work.aligned && place * kCount < work.columns)
        SumRows<T, kCount>(work, BlockX(), place * kCount);
    else if (!work.aligned && place < work.columns)
        SumRows<T, 1>(work, BlockX(), place);
}

}  // namespace

const char* RunTableGradient(const TableGradient& work, Element type, void* stream) {
    return WithElement(type, [&](auto element) {
        typedef decltype(element) T;
        const int64_t places = work.aligned ? work.columns / Chunk<T>::kCount : work.columns;
        return Launch(Gather<T>, {work.rows, (places + kThreads - 1) / kThreads, 1}, kThreads, 0, stream,
                      work);
    });
}

}  // namespace elle_mp
