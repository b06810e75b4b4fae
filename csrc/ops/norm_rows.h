// The kernels of norms.h for one instruction level and element type. They give bit for bit what dropout, sum
// and norm give one after the other: what each would have stored is rounded as it would have been.
#pragma once

#include "masks.h"

namespace elle_mp {
namespace ELLE_LEVEL {

// As if stored in the element type and loaded again; never fused into an operation that follows.
template <typename T>
ELLE_INLINE Vec Round(Vec x);
template <>
ELLE_INLINE Vec Round<float>(Vec x) {
#if defined(__x86_64__)
    __asm__("" : "+v"(x));
#elif defined(__aarch64__)
    __asm__("" : "+w"(x));
#endif
    return x;
}
template <>
ELLE_INLINE Vec Round<BFloat16>(Vec x) {
    BFloat16 stored[kWidth];
    Store(stored, x);
    return Load(stored);
}

ELLE_INLINE Int LanesBelow(int64_t count) {
    int32_t lanes[kWidth];
    for (int i = 0; i < kWidth; ++i) lanes[i] = i < count ? -1 : 0;
    return LoadInt(lanes);
}

// A register from `column` on, zeros behind the row's end.
template <typename T>
ELLE_INLINE Vec Part(const T* row, int64_t column, int64_t columns) {
    return column + kWidth <= columns ? Load(row + column)
                                      : LoadTail(row + column, static_cast<int>(columns - column), 0.0f);
}
template <typename T>
ELLE_INLINE void StorePart(T* row, int64_t column, int64_t columns, Vec x) {
    if (column + kWidth <= columns)
        Store(row + column, x);
    else
        StoreTail(row + column, x, static_cast<int>(columns - column));
}

// out = dropout(x) + residual, also as floats, padded by zeros; `residual` and `floats` may be null.
template <typename T>
ELLE_INLINE void DropAddRow(const T* x, const T* residual, T* out, float* floats, int64_t columns,
                            const RowMask* mask, float scale) {
    const Vec factor = Fill(scale);
    for (int64_t c = 0; c < columns; c += RowMask::kStep) {
        const bool both = c + kWidth < columns;
        Vec first = Part(x, c, columns), second = both ? Part(x, c + kWidth, columns) : Vec{};
        if (mask) {
            first = Round<T>(first * factor);
            second = Round<T>(second * factor);
            mask->Apply(c, first, second);
        }
        if (residual) {
            first = Round<T>(first + Part(residual, c, columns));
            if (both) second = Round<T>(second + Part(residual, c + kWidth, columns));
        }
        StorePart(out, c, columns, first);
        if (both) StorePart(out, c + kWidth, columns, second);
        if (floats) {
            Store(floats + c, first);
            if (both) Store(floats + c + kWidth, second);
        }
    }
}

// sum of w (x - mean)^power over the columns, x padded; w is 1 where nothing is weighted.
template <bool kWeighted, int kPower>
ELLE_INLINE float Moment(const float* x, const float* w, float mean, int64_t columns) {
    const Vec centre = Fill(mean);
    Vec sums[4] = {};
    int64_t c = 0;
    for (; c + 4 * kWidth <= columns; c += 4 * kWidth)
        for (int i = 0; i < 4; ++i) {
            Vec d = Load(x + c + i * kWidth);
            if (kPower == 2) d = (d - centre) * (d - centre);
            sums[i] += kWeighted ? d * Load(w + c + i * kWidth) : d;
        }
    for (; c < columns; c += kWidth) {
        Vec d = Load(x + c);
        if (kPower == 2) d = (d - centre) * (d - centre);
        if (kWeighted) d *= Load(w + c);
        sums[0] += c + kWidth <= columns ? d : Choose(LanesBelow(columns - c), d, Vec{});
    }
    return Sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// y = norm(x) of row `row`; x is padded.
template <typename T, bool kWeighted>
ELLE_INLINE void NormaliseRow(const Norm& norm, const float* x, int64_t row, T* y) {
    const int64_t columns = norm.columns;
    const float even = kWeighted ? 1.0f : 1.0f / static_cast<float>(columns);
    const float* w = norm.stat_weights;
    const float mean = norm.rms ? 0.0f : even * Moment<kWeighted, 1>(x, w, 0.0f, columns);
    const float variance = even * Moment<kWeighted, 2>(x, w, mean, columns);
    const float rstd = 1.0f / __builtin_sqrtf(variance + norm.eps);
    norm.mean[row] = mean;
    norm.rstd[row] = rstd;
    const Vec centre = Fill(mean), scale = Fill(rstd);
    int64_t c = 0;
    for (; c + kWidth <= columns; c += kWidth)
        Store(y + c, (Load(x + c) - centre) * scale * Load(norm.weight + c) + Load(norm.bias + c));
    if (c < columns)
        StoreTail(y + c, (Load(x + c) - centre) * scale * Load(norm.weight + c) + Load(norm.bias + c),
                  static_cast<int>(columns - c));
}

template <typename T, bool kWeighted>
ELLE_NOINLINE void NormForward(const NormRows& work, int64_t begin, int64_t end, float* scratch) {
    const int64_t columns = work.norm.columns;
    for (int64_t r = begin; r < end; ++r) {
        const T* x = static_cast<const T*>(work.x) + r * columns;
        const float* values = scratch;
        if (work.h) {
            const T* residual = work.residual ? static_cast<const T*>(work.residual) + r * columns : nullptr;
            T* h = static_cast<T*>(work.h) + r * columns;
            if (work.masks.threshold > 0) {
                const RowMask mask(work.masks, r);
                DropAddRow(x, residual, h, scratch, columns, &mask, work.masks.keep_scale);
            } else {
                DropAddRow<T>(x, residual, h, scratch, columns, nullptr, 1.0f);
            }
        } else if (sizeof(T) == sizeof(float) && columns % kWidth == 0) {
            values = reinterpret_cast<const float*>(x);
        } else {
            for (int64_t c = 0; c < columns; c += kWidth) Store(scratch + c, Part(x, c, columns));
        }
        NormaliseRow<T, kWeighted>(work.norm, values, r, static_cast<T*>(work.y) + r * columns);
    }
}

// out = dh + d norm / d h of row `row`, and its part of d_weight and d_bias; dh may be null.
template <typename T, bool kWeighted>
ELLE_INLINE void BackRow(const Norm& norm, int64_t row, const T* h, const T* dy, const T* dh, T* out,
                         float* d_weight, float* d_bias) {
    const int64_t columns = norm.columns;
    const float even = kWeighted ? 1.0f : 1.0f / static_cast<float>(columns);
    const Vec mean = Fill(norm.mean[row]), rstd = Fill(norm.rstd[row]);
    Vec alongs[2] = {}, levels[2] = {};
    int64_t c = 0;
    for (; c + 2 * kWidth <= columns; c += 2 * kWidth)
        for (int j = 0; j < 2; ++j) {
            const Vec dn = Load(dy + c + j * kWidth) * Load(norm.weight + c + j * kWidth);
            alongs[j] += dn * ((Load(h + c + j * kWidth) - mean) * rstd);
            levels[j] += dn;
        }
    for (; c < columns; c += kWidth) {
        const Vec dn = Part(dy, c, columns) * Load(norm.weight + c);
        alongs[0] += dn * ((Part(h, c, columns) - mean) * rstd);
        levels[0] += dn;
    }
    const Vec along = Fill(Sum(alongs[0] + alongs[1]) * even);
    const Vec level = norm.rms ? Vec{} : Fill(Sum(levels[0] + levels[1]) * even);
    for (c = 0; c < columns; c += kWidth) {
        const Vec grad = Part(dy, c, columns), normal = (Part(h, c, columns) - mean) * rstd;
        Store(d_weight + c, Load(d_weight + c) + grad * normal);
        Store(d_bias + c, Load(d_bias + c) + grad);
        // d mean / d h_i = w_i and d variance / d h_i = 2 w_i (h_i - mean), because sum w (h - mean) = 0.
        Vec shared = normal * along + level;
        if (kWeighted) shared *= Load(norm.stat_weights + c);
        Vec dx = (grad * Load(norm.weight + c) - shared) * rstd;
        if (dh) dx = Round<T>(dx) + Part(dh, c, columns);
        StorePart(out, c, columns, dx);
    }
}

// One row after the other: several side by side would write to as many pages.
template <typename T, bool kWeighted>
ELLE_NOINLINE void NormBackward(const NormRows& work, int64_t begin, int64_t end, float* d_weight,
                                float* d_bias) {
    const int64_t columns = work.norm.columns;
    for (int64_t r = begin; r < end; ++r) {
        const int64_t at = r * columns;
        const T* dh = work.dh ? static_cast<const T*>(work.dh) + at : nullptr;
        T* out = static_cast<T*>(work.d_residual) + at;
        BackRow<T, kWeighted>(work.norm, r, static_cast<const T*>(work.kept) + at,
                              static_cast<const T*>(work.dy) + at, dh, out, d_weight, d_bias);
        if (work.d_x == nullptr) continue;
        const RowMask mask(work.masks, r);
        DropAddRow<T>(out, nullptr, static_cast<T*>(work.d_x) + at, nullptr, columns, &mask,
                      work.masks.keep_scale);
    }
}

template <typename T>
ELLE_NOINLINE void NormForwardRows(const NormRows& work, int64_t begin, int64_t end, float* scratch) {
    if (work.norm.stat_weights)
        NormForward<T, true>(work, begin, end, scratch);
    else
        NormForward<T, false>(work, begin, end, scratch);
}

template <typename T>
ELLE_NOINLINE void NormBackwardRows(const NormRows& work, int64_t begin, int64_t end, float* d_weight,
                                    float* d_bias) {
    if (work.norm.stat_weights)
        NormBackward<T, true>(work, begin, end, d_weight, d_bias);
    else
        NormBackward<T, false>(work, begin, end, d_weight, d_bias);
}

template <typename T>
ELLE_TARGET inline NormKernels MakeNorms() {
    return {NormForwardRows<T>, NormBackwardRows<T>};
}

}  // namespace ELLE_LEVEL
}  // namespace elle_mp
