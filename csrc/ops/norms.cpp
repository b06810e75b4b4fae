#include "norms.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <vector>

#include "levels.h"
#include "rows.h"

namespace elle_mp {
namespace {

// What forward and backward share; `like` is x or h.
struct Call {
    std::vector<float> weight, bias, stat_weights;
    NormRows work{};
    NormKernels kernels{};
    int64_t rows = 0;

    Call(const Tensor& like, const Tensor& weight_, const std::optional<Tensor>& bias_,
         const std::optional<Tensor>& stat_weights_, const std::optional<Tensor>& keys, int64_t first_row,
         int64_t threshold, double eps, bool rms) {
        STD_TORCH_CHECK(like.is_cpu() && like.dim() >= 1 && like.is_contiguous(),
                        "add_norm wants contiguous rows [..., D] on the CPU");
        Norm& norm = work.norm;
        norm.columns = like.size(like.dim() - 1);
        rows = norm.columns == 0 ? 0 : like.numel() / norm.columns;
        const LevelKernels level = Level();
        kernels = IsFloat(like, "add_norm") ? level.norm_fp32 : level.norm_bf16;
        weight = Floats(weight_, norm.columns, "weight");
        bias = bias_ ? Floats(*bias_, norm.columns, "bias") : std::vector<float>(weight.size(), 0.0f);
        if (stat_weights_) stat_weights = Floats(*stat_weights_, norm.columns, "stat_weights");
        norm.weight = weight.data();
        norm.bias = bias.data();
        norm.stat_weights = stat_weights_ ? stat_weights.data() : nullptr;
        norm.eps = static_cast<float>(eps);
        norm.rms = rms;
        work.masks = Masks(keys, rows, first_row, threshold);
    }

    void SetStatistics(const Tensor& statistics) {
        work.norm.mean = static_cast<float*>(statistics.data_ptr());
        work.norm.rstd = work.norm.mean + rows;
    }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> AddNorm(Tensor x, std::optional<Tensor> residual, Tensor weight,
                                           std::optional<Tensor> bias, std::optional<Tensor> stat_weights,
                                           std::optional<Tensor> keys, int64_t first_row, int64_t threshold,
                                           double eps, bool rms) {
    Call call(x, weight, bias, stat_weights, keys, first_row, threshold, eps, rms);
    const bool adds = residual.has_value() || threshold > 0;
    const Tensor y = EmptyRows(x, true), h = EmptyRows(x, adds);
    const Tensor statistics =
        torch::stable::empty({2, call.rows}, ScalarType::Float, std::nullopt, x.device());
    call.SetStatistics(statistics);
    NormRows& work = call.work;
    work.x = x.data_ptr();
    if (residual) {
        CheckRows(*residual, x, "residual");
        work.residual = residual->data_ptr();
    }
    work.h = adds ? h.data_ptr() : nullptr;
    work.y = y.data_ptr();
    const int64_t columns = work.norm.columns;
    torch::stable::parallel_for(0, call.rows, Grain(columns), [&](int64_t begin, int64_t end) {
        std::vector<float> scratch(Padded(columns));
        call.kernels.forward(work, begin, end, scratch.data());
    });
    return {y, h, statistics};
}

std::tuple<Tensor, Tensor, Tensor> AddNormBackward(Tensor dy, std::optional<Tensor> dh, Tensor h,
                                                   Tensor weight, std::optional<Tensor> stat_weights,
                                                   Tensor statistics, std::optional<Tensor> keys,
                                                   int64_t first_row, int64_t threshold, bool rms) {
    Call call(h, weight, std::nullopt, stat_weights, keys, first_row, threshold, 0.0, rms);
    CheckRows(dy, h, "dy");
    STD_TORCH_CHECK(statistics.is_cpu() && statistics.scalar_type() == ScalarType::Float &&
                        statistics.numel() == 2 * call.rows && statistics.is_contiguous(),
                    "statistics do not fit");
    call.SetStatistics(statistics);
    const int64_t columns = call.work.norm.columns;
    const Tensor d_residual = EmptyRows(h, true), d_x = EmptyRows(h, threshold > 0);
    const Tensor sums = torch::stable::empty({2, columns}, ScalarType::Float, std::nullopt, h.device());
    NormRows& work = call.work;
    work.kept = h.data_ptr();
    work.dy = dy.data_ptr();
    if (dh) {
        CheckRows(*dh, h, "dh");
        work.dh = dh->data_ptr();
    }
    work.d_residual = d_residual.data_ptr();
    work.d_x = threshold > 0 ? d_x.data_ptr() : nullptr;
    const auto body = [&](int64_t begin, int64_t end, float*, float* d_weight, float* d_bias) {
        call.kernels.backward(work, begin, end, d_weight, d_bias);
    };
    SumInBlocks(call.rows, columns, 0, body, static_cast<float*>(sums.data_ptr()));
    return {d_residual, d_x, sums};
}

}  // namespace elle_mp
