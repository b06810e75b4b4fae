// LayerNorm, with weighted statistics too, and RMSNorm of h = residual + dropout(x).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace elle_mp {

using torch::stable::Tensor;

// x and residual [..., D], contiguous, fp32 or bf16; weight and bias [D] in fp32 or bf16; stat_weights [D] in
// fp32 or fp64; keys [K], of as many rows each, where the threshold is not 0 -> y and h [..., D] (h is empty
// where it is x), statistics fp32 [2, rows]: mean and reciprocal standard deviation.
std::tuple<Tensor, Tensor, Tensor> AddNorm(Tensor x, std::optional<Tensor> residual, Tensor weight,
                                           std::optional<Tensor> bias, std::optional<Tensor> stat_weights,
                                           std::optional<Tensor> keys, int64_t first_row, int64_t threshold,
                                           double eps, bool rms);
// -> gradients of residual and x (empty where the threshold is 0: the same), and of weight and bias, fp32 [2,
// D].
std::tuple<Tensor, Tensor, Tensor> AddNormBackward(Tensor dy, std::optional<Tensor> dh, Tensor h,
                                                   Tensor weight, std::optional<Tensor> stat_weights,
                                                   Tensor statistics, std::optional<Tensor> keys,
                                                   int64_t first_row, int64_t threshold, bool rms);

}  // namespace elle_mp
