#include "cross_entropy.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>

#include "levels.h"

namespace elle_mp {
namespace {

using torch::headeronly::ScalarType;

// Elements that are worth another thread.
constexpr int64_t kGrain = 1 << 14;

void Check(const Tensor& x, ScalarType type, int64_t rows, const char* name) {
    STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == type && x.numel() == rows && x.is_contiguous(), name,
                    " does not fit");
}

Logits Describe(const Tensor& logits, const Tensor& targets) {
    STD_TORCH_CHECK(logits.is_cpu() && logits.dim() == 2 && (logits.size(1) <= 1 || logits.stride(1) == 1),
                    "logits must be [n, V] on the CPU, with unit stride in V");
    Logits work{};
    work.logits = logits.data_ptr();
    work.rows = logits.size(0);
    work.columns = logits.size(1);
    work.stride = logits.stride(0);
    Check(targets, ScalarType::Long, work.rows, "targets");
    work.targets = static_cast<const int64_t*>(targets.data_ptr());
    return work;
}

CrossEntropyKernels Choose(const Tensor& logits) {
    const ScalarType type = logits.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16,
                    "logits must be float32 or bfloat16");
    const LevelKernels level = Level();
    return type == ScalarType::Float ? level.cross_entropy_fp32 : level.cross_entropy_bf16;
}

void ForRows(const Logits& work, void (*kernel)(const Logits&, int64_t, int64_t)) {
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work.columns));
    torch::stable::parallel_for(0, work.rows, grain,
                                [&](int64_t begin, int64_t end) { kernel(work, begin, end); });
}

}  // namespace

Tensor LogitStatistics(Tensor logits, Tensor targets) {
    Logits work = Describe(logits, targets);
    const CrossEntropyKernels kernels = Choose(logits);
    Tensor statistics =
        torch::stable::empty({4, work.rows}, ScalarType::Float, std::nullopt, logits.device());
    work.statistics = static_cast<float*>(statistics.data_ptr());
    ForRows(work, kernels.statistics);
    return statistics;
}

void LogitGradient(Tensor logits, Tensor targets, Tensor lse, Tensor factors, double hit, double uniform) {
    Logits work = Describe(logits, targets);
    Check(lse, ScalarType::Float, work.rows, "lse");
    Check(factors, ScalarType::Float, work.rows, "factors");
    work.lse = static_cast<const float*>(lse.data_ptr());
    work.factors = static_cast<const float*>(factors.data_ptr());
    work.hit = static_cast<float>(hit);
    work.uniform = static_cast<float>(uniform);
    ForRows(work, Choose(logits).gradient);
}

}  // namespace elle_mp
