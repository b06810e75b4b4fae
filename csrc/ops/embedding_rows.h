// The kernels of prompt_embedding.h for one instruction level and element type.
#pragma once

#include "norm_rows.h"

namespace elle_mp {
namespace ELLE_LEVEL {

// out = the sum of the rows that row `row` is made of; also as floats, padded, where `floats` is not null.
template <typename T>
ELLE_INLINE void GatherRow(const EmbeddingRows& work, int64_t row, T* out, float* floats) {
    const int64_t columns = work.columns;
    bool prompt = false;
    const int64_t entry = work.Entry(row, prompt);
    const void* table = prompt ? work.prompt_table : work.table;
    const T* from =
        entry < 0 ? static_cast<const T*>(work.zeros) : static_cast<const T*>(table) + entry * columns;
    const T* position = work.position_table ? static_cast<const T*>(work.position_table) +
                                                  work.at[row % work.length] * columns
                                            : nullptr;
    DropAddRow<T>(from, position, out, floats, columns, nullptr, 1.0f);
}

template <typename T, bool kWeighted>
ELLE_INLINE void EmbedRow(const EmbeddingRows& work, int64_t row, float* scratch) {
    const int64_t columns = work.columns;
    T* y = static_cast<T*>(work.y) + row * columns;
    GatherRow<T>(work, row, y, work.normed ? scratch : nullptr);
    if (work.normed) NormaliseRow<T, kWeighted>(work.norm, scratch, row, y);
    if (work.masks.threshold > 0) {
        const RowMask mask(work.masks, row);
        DropAddRow<T>(y, nullptr, y, nullptr, columns, &mask, work.masks.keep_scale);
    }
}

template <typename T>
ELLE_NOINLINE void EmbeddingForward(const EmbeddingRows& work, int64_t begin, int64_t end, float* scratch) {
    const bool weighted = work.normed && work.norm.stat_weights != nullptr;
    for (int64_t r = begin; r < end; ++r)
        if (weighted)
            EmbedRow<T, true>(work, r, scratch);
        else
            EmbedRow<T, false>(work, r, scratch);
}

template <typename T, bool kWeighted>
ELLE_INLINE void EmbedBackRow(const EmbeddingRows& work, int64_t row, float* scratch, float* d_weight,
                              float* d_bias) {
    const int64_t columns = work.columns, padded = (columns + kGroup - 1) / kGroup * kGroup;
    const T* dy = static_cast<const T*>(work.dy) + row * columns;
    T* out = static_cast<T*>(work.d_rows) + row * columns;
    if (work.masks.threshold > 0) {
        const RowMask mask(work.masks, row);
        T* to = work.normed ? reinterpret_cast<T*>(scratch) : out;
        DropAddRow<T>(dy, nullptr, to, nullptr, columns, &mask, work.masks.keep_scale);
        dy = to;
    }
    if (!work.normed) return;
    T* h = reinterpret_cast<T*>(scratch + padded);
    GatherRow<T>(work, row, h, nullptr);
    BackRow<T, kWeighted>(work.norm, row, h, dy, nullptr, out, d_weight, d_bias);
}

template <typename T>
ELLE_NOINLINE void EmbeddingBackward(const EmbeddingRows& work, int64_t begin, int64_t end, float* scratch,
                                     float* d_weight, float* d_bias) {
    const bool weighted = work.normed && work.norm.stat_weights != nullptr;
    for (int64_t r = begin; r < end; ++r)
        if (weighted)
            EmbedBackRow<T, true>(work, r, scratch, d_weight, d_bias);
        else
            EmbedBackRow<T, false>(work, r, scratch, d_weight, d_bias);
}

template <typename T>
ELLE_NOINLINE void SumRows(const void* rows, const int64_t* order, int64_t begin, int64_t end,
                           int64_t columns, float* scratch, void* out) {
    const T* from = static_cast<const T*>(rows);
    T* to = static_cast<T*>(out);
    const std::size_t bytes = static_cast<std::size_t>(columns) * sizeof(T);
    if (begin == end) {
        std::memset(out, 0, bytes);
        return;
    }
    if (end - begin == 1) {
        std::memcpy(out, static_cast<const void*>(from + order[begin] * columns), bytes);
        return;
    }
    for (int64_t c = 0; c < columns; c += kWidth)
        Store(scratch + c, Part(from + order[begin] * columns, c, columns));
    for (int64_t i = begin + 1; i < end; ++i) {
        const T* row = from + order[i] * columns;
        for (int64_t c = 0; c < columns; c += kWidth)
            Store(scratch + c, Load(scratch + c) + Part(row, c, columns));
    }
    for (int64_t c = 0; c < columns; c += kWidth) StorePart(to, c, columns, Load(scratch + c));
}

template <typename T>
ELLE_TARGET inline EmbeddingKernels MakeEmbedding() {
    return {EmbeddingForward<T>, EmbeddingBackward<T>, SumRows<T>};
}

}  // namespace ELLE_LEVEL
}  // namespace elle_mp
