#include "norms.h"

#include <algorithm>

#include "binding.h"

namespace elle_mp {
namespace {

// A call, with the tensors that it reads kept alive; `like` is x or h.
struct Call {
    NormRows work{};
    Device device;
    Element type;
    std::vector<Tensor> kept;

    Call(const Tensor& like, const Tensor& weight, const std::optional<Tensor>& bias,
         const std::optional<Tensor>& stat_weights, const std::optional<Tensor>& keys, int64_t first_row,
         int64_t threshold, double eps, bool rms)
        : device(like), type(ElementOf(like, "add_norm")) {
        STD_TORCH_CHECK(type != Element::kDouble, "add_norm has no CUDA kernel for float64");
        STD_TORCH_CHECK(like.dim() >= 1 && like.is_contiguous(), "add_norm wants contiguous rows [..., D]");
        work.columns = like.size(like.dim() - 1);
        work.rows = work.columns == 0 ? 0 : like.numel() / work.columns;
        STD_TORCH_CHECK(work.columns <= kMostColumns, "add_norm: rows of more than ", kMostColumns,
                        " columns");
        work.aligned = work.columns * (type == Element::kFloat ? 4 : 2) % 16 == 0;
        work.weight = Floats(weight, like, "weight");
        work.bias = bias ? Floats(*bias, like, "bias") : nullptr;
        work.stat_weights = stat_weights ? Floats(*stat_weights, like, "stat_weights") : nullptr;
        work.eps = static_cast<float>(eps);
        work.rms = rms;
        SetMasks(like, keys, first_row, threshold);
    }

    // [rows, columns] of the type of `like`.
    void* Rows(const Tensor& x, const Tensor& like, const char* name) {
        CheckFits(x, like, like.scalar_type(), work.rows * work.columns, name);
        work.aligned = work.aligned && reinterpret_cast<std::uintptr_t>(x.data_ptr()) % 16 == 0;
        return x.data_ptr();
    }
    void SetStatistics(const Tensor& statistics, const Tensor& like) {
        CheckFits(statistics, like, ScalarType::Float, 2 * work.rows, "statistics");
        work.mean = DataOf<float>(statistics);
        work.rstd = work.mean + work.rows;
    }

  private:
    const float* Floats(const Tensor& x, const Tensor& like, const char* name) {
        kept.push_back(x.scalar_type() == ScalarType::Float ? x : torch::stable::to(x, ScalarType::Float));
        CheckFits(kept.back(), like, ScalarType::Float, work.columns, name);
        return DataOf<const float>(kept.back());
    }
    void SetMasks(const Tensor& like, const std::optional<Tensor>& keys, int64_t first_row,
                  int64_t threshold) {
        STD_TORCH_CHECK(threshold >= 0 && threshold < 65536, "the threshold is not one of 65536 levels");
        work.threshold = static_cast<uint32_t>(threshold);
        work.keep_scale = static_cast<float>(65536.0 / (65536.0 - static_cast<double>(threshold)));
        work.first_row = first_row;
        work.run = std::max<int64_t>(work.rows, 1);
        if (threshold == 0) return;
        STD_TORCH_CHECK(keys.has_value(), "dropout wants keys");
        CheckFits(*keys, like, ScalarType::Long, keys->numel(), "keys");
        STD_TORCH_CHECK(work.rows == 0 || (keys->numel() > 0 && work.rows % keys->numel() == 0),
                        "keys do not fit");
        work.keys = DataOf<const int64_t>(*keys);
        if (work.rows > 0) work.run = work.rows / keys->numel();
    }
};

Tensor EmptyRows(const Tensor& like, bool rows) {
    return EmptyOf(like, rows ? SizesOf(like) : std::vector<int64_t>{0}, like.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> AddNorm(Tensor x, std::optional<Tensor> residual, Tensor weight,
                                           std::optional<Tensor> bias, std::optional<Tensor> stat_weights,
                                           std::optional<Tensor> keys, int64_t first_row, int64_t threshold,
                                           double eps, bool rms) {
    Call call(x, weight, bias, stat_weights, keys, first_row, threshold, eps, rms);
    NormRows& work = call.work;
    const bool adds = residual.has_value() || threshold > 0;
    const Tensor y = EmptyRows(x, true), h = EmptyRows(x, adds);
    const Tensor statistics = EmptyOf(x, {2, work.rows}, ScalarType::Float);
    call.SetStatistics(statistics, x);
    work.x = call.Rows(x, x, "x");
    if (residual) work.residual = call.Rows(*residual, x, "residual");
    if (adds) work.h = call.Rows(h, x, "h");
    work.y = call.Rows(y, x, "y");
    Check(RunAddNorm(work, call.type, call.device.stream()));
    return {y, h, statistics};
}

std::tuple<Tensor, Tensor, Tensor> AddNormBackward(Tensor dy, std::optional<Tensor> dh, Tensor h,
                                                   Tensor weight, std::optional<Tensor> stat_weights,
                                                   Tensor statistics, std::optional<Tensor> keys,
                                                   int64_t first_row, int64_t threshold, bool rms) {
    Call call(h, weight, std::nullopt, stat_weights, keys, first_row, threshold, 0.0, rms);
    NormRows& work = call.work;
    call.SetStatistics(statistics, h);
    const Tensor d_residual = EmptyRows(h, true), d_x = EmptyRows(h, threshold > 0);
    const Tensor sums = EmptyOf(h, {2, work.columns}, ScalarType::Float);
    work.kept = call.Rows(h, h, "h");
    work.dy = call.Rows(dy, h, "dy");
    if (dh) work.dh = call.Rows(*dh, h, "dh");
    work.d_residual = call.Rows(d_residual, h, "d_residual");
    if (threshold > 0) work.d_x = call.Rows(d_x, h, "d_x");
    work.rows_in_block = std::max(kNormRows, (work.rows + kNormBlocks - 1) / kNormBlocks);
    work.blocks = (work.rows + work.rows_in_block - 1) / work.rows_in_block;
    const Tensor parts = EmptyOf(h, {work.blocks, 2, work.columns}, ScalarType::Float);
    work.parts = DataOf<float>(parts);
    work.sums = DataOf<float>(sums);
    Check(RunAddNormBackward(work, call.type, call.device.stream()));
    return {d_residual, d_x, sums};
}

}  // namespace
}  // namespace elle_mp

STABLE_TORCH_LIBRARY_IMPL(ELLE_LIBRARY, ELLE_KEY, m) {
    m.impl("add_norm", TORCH_BOX(&elle_mp::AddNorm));
    m.impl("add_norm_backward", TORCH_BOX(&elle_mp::AddNormBackward));
}
