// The kernels of cross_entropy.h for one instruction level and element type.
#pragma once

#include <algorithm>

#include "vectors.h"

namespace elle_mp {
namespace ELLE_LEVEL {

ELLE_INLINE Vec Exp(Vec x) { return Exp2<true>(x * kLog2E); }

// A register of a row's columns from `column` on; `rest` beyond its end.
template <typename T>
ELLE_INLINE Vec Columns(const T* row, int64_t column, int64_t columns, float rest) {
    return column + kWidth <= columns ? Load(row + column)
                                      : LoadTail(row + column, static_cast<int>(columns - column), rest);
}

template <typename T>
ELLE_NOINLINE void StatisticsOfRows(const Logits& work, int64_t begin, int64_t end) {
    constexpr int64_t kStep = 4 * kWidth;
    const int64_t columns = work.columns;
    for (int64_t r = begin; r < end; ++r) {
        const T* row = static_cast<const T*>(work.logits) + r * work.stride;
        Vec tops[4], sums[4], totals[4];
        for (int i = 0; i < 4; ++i) {
            tops[i] = Fill(kLowest);
            sums[i] = totals[i] = Vec{};
        }
        int64_t column = 0;
        for (; column + kStep <= columns; column += kStep)
            for (int i = 0; i < 4; ++i) {
                const Vec x = Load(row + column + i * kWidth);
                tops[i] = Max(tops[i], x);
                sums[i] += x;
            }
        for (; column < columns; column += kWidth) {
            tops[0] = Max(tops[0], Columns(row, column, columns, kLowest));
            sums[0] += Columns(row, column, columns, 0.0f);
        }
        float top = kLowest;
        for (int i = 0; i < 4; ++i) {
            float lanes[kWidth];
            Store(lanes, tops[i]);
            for (float lane : lanes) top = std::max(top, lane);
        }
        const Vec highest = Fill(top);
        for (column = 0; column + kStep <= columns; column += kStep)
            for (int i = 0; i < 4; ++i) totals[i] += Exp(Load(row + column + i * kWidth) - highest);
        for (; column < columns; column += kWidth)
            totals[0] += Exp(Columns(row, column, columns, kLowest) - highest);
        const int64_t target = work.targets[r];
        float* to = work.statistics + r;
        to[0] = top;
        to[work.rows] = Sum((totals[0] + totals[1]) + (totals[2] + totals[3]));
        to[2 * work.rows] = target >= 0 && target < columns ? ToFloat(row[target]) : 0.0f;
        to[3 * work.rows] = Sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
}

template <typename T>
ELLE_NOINLINE void GradientOfRows(const Logits& work, int64_t begin, int64_t end) {
    const int64_t columns = work.columns;
    const Vec uniform = Fill(work.uniform);
    for (int64_t r = begin; r < end; ++r) {
        T* row = static_cast<T*>(work.logits) + r * work.stride;
        if (work.factors[r] == 0.0f) {
            std::memset(static_cast<void*>(row), 0, static_cast<std::size_t>(columns) * sizeof(T));
            continue;
        }
        const int64_t target = work.targets[r];
        const bool here = target >= 0 && target < columns;
        const float logit = here ? ToFloat(row[target]) : 0.0f;
        const Vec lse = Fill(work.lse[r]), factor = Fill(work.factors[r]);
        int64_t column = 0;
        for (; column + kWidth <= columns; column += kWidth)
            Store(row + column, factor * Exp(Load(row + column) - lse) - uniform);
        if (column < columns) {
            const int lanes = static_cast<int>(columns - column);
            StoreTail(row + column, factor * Exp(LoadTail(row + column, lanes, kLowest) - lse) - uniform,
                      lanes);
        }
        if (here) {
            float lanes[kWidth];
            Store(lanes, factor * Exp(Fill(logit) - lse) - uniform - work.hit);
            FromFloat(row + target, lanes[0]);
        }
    }
}

template <typename T>
ELLE_TARGET inline CrossEntropyKernels MakeCrossEntropy() {
    return {StatisticsOfRows<T>, GradientOfRows<T>};
}

}  // namespace ELLE_LEVEL
}  // namespace elle_mp
