// What the ops on rows of hidden states share.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "problem.h"

namespace elle_mp {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline int64_t Padded(int64_t columns) { return (columns + kGroup - 1) / kGroup * kGroup; }

// Rows that are worth another thread.
inline int64_t Grain(int64_t columns) {
    return std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, columns));
}

// Whether it is fp32; otherwise it must be bf16.
inline bool IsFloat(const Tensor& x, const char* op) {
    const ScalarType type = x.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, op,
                    " has kernels for float32 and bfloat16");
    return type == ScalarType::Float;
}

// The entries of a vector [count] as floats, padded by zeros.
inline std::vector<float> Floats(const Tensor& x, int64_t count, const char* name) {
    STD_TORCH_CHECK(x.is_cpu() && x.numel() == count && x.is_contiguous(), name, " does not fit");
    std::vector<float> to(static_cast<std::size_t>(Padded(count)), 0.0f);
    if (x.scalar_type() == ScalarType::Double) {
        const double* from = static_cast<const double*>(x.data_ptr());
        for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(from[i]);
    } else if (IsFloat(x, name)) {
        std::copy_n(static_cast<const float*>(x.data_ptr()), count, to.data());
    } else {
        const uint16_t* from = static_cast<const uint16_t*>(x.data_ptr());
        for (int64_t i = 0; i < count; ++i) {
            const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
            std::memcpy(&to[i], &bits, sizeof bits);
        }
    }
    return to;
}

// Rows like those of `like`, or none.
inline Tensor EmptyRows(const Tensor& like, bool rows) {
    std::vector<int64_t> sizes;
    if (rows)
        for (int64_t i = 0; i < like.dim(); ++i) sizes.push_back(like.size(i));
    else
        sizes.push_back(0);
    return torch::stable::empty(sizes, like.scalar_type(), std::nullopt, like.device());
}

inline void CheckRows(const Tensor& x, const Tensor& like, const char* name) {
    bool fits =
        x.is_cpu() && x.scalar_type() == like.scalar_type() && x.dim() == like.dim() && x.is_contiguous();
    for (int64_t i = 0; fits && i < x.dim(); ++i) fits = x.size(i) == like.size(i);
    STD_TORCH_CHECK(fits, name, " does not fit");
}

// Masks of `rows` rows, equally many for each key.
inline RowMasks Masks(const std::optional<Tensor>& keys, int64_t rows, int64_t first_row, int64_t threshold) {
    STD_TORCH_CHECK(threshold >= 0 && threshold < 65536, "the threshold is not one of 65536 levels");
    RowMasks masks{};
    masks.threshold = static_cast<uint32_t>(threshold);
    masks.run = std::max<int64_t>(rows, 1);
    masks.first_row = first_row;
    masks.keep_scale = static_cast<float>(65536.0 / (65536.0 - static_cast<double>(threshold)));
    if (threshold == 0) return masks;
    STD_TORCH_CHECK(keys.has_value(), "dropout wants keys");
    STD_TORCH_CHECK(keys->is_cpu() && keys->scalar_type() == ScalarType::Long && keys->is_contiguous() &&
                        (rows == 0 || (keys->numel() > 0 && rows % keys->numel() == 0)),
                    "keys do not fit");
    masks.keys = static_cast<const int64_t*>(keys->data_ptr());
    if (rows > 0) masks.run = rows / keys->numel();
    return masks;
}

// body(begin, end, scratch, first, second) adds to two sums over rows, [columns] each, padded; they are made
// in blocks that do not depend on the number of threads, and `sums` [2, columns] gets their totals.
template <typename F>
void SumInBlocks(int64_t rows, int64_t columns, int64_t scratch_floats, const F& body, float* sums) {
    constexpr int64_t kBlockRows = 64, kMostBlocks = 64;
    const int64_t padded = Padded(columns);
    const int64_t each = std::max(kBlockRows, (rows + kMostBlocks - 1) / kMostBlocks);
    const int64_t blocks = (rows + each - 1) / each;
    std::vector<float> parts(static_cast<std::size_t>(blocks * 2 * padded), 0.0f);
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
        std::vector<float> scratch(static_cast<std::size_t>(scratch_floats));
        for (int64_t block = begin; block < end; ++block) {
            float* part = parts.data() + block * 2 * padded;
            body(block * each, std::min(rows, (block + 1) * each), scratch.data(), part, part + padded);
        }
    });
    std::fill(sums, sums + 2 * columns, 0.0f);
    for (int64_t block = 0; block < blocks; ++block)
        for (int64_t half = 0; half < 2; ++half) {
            const float* part = parts.data() + (2 * block + half) * padded;
            for (int64_t c = 0; c < columns; ++c) sums[half * columns + c] += part[c];
        }
}

}  // namespace elle_mp
