#include "cross_entropy.h"

#include "binding.h"

namespace elle_mp {
namespace {

Logits Describe(const Tensor& logits, const Tensor& targets) {
    STD_TORCH_CHECK(logits.dim() == 2 && (logits.size(1) <= 1 || logits.stride(1) == 1),
                    "logits must be [n, V], with unit stride in V");
    STD_TORCH_CHECK(logits.scalar_type() != ScalarType::Double, "logits must not be float64");
    Logits work{};
    work.logits = logits.data_ptr();
    work.rows = logits.size(0);
    work.columns = logits.size(1);
    work.stride = logits.stride(0);
    CheckFits(targets, logits, ScalarType::Long, work.rows, "targets");
    work.targets = DataOf<const int64_t>(targets);
    return work;
}

Tensor LogitStatistics(Tensor logits, Tensor targets) {
    const Device device(logits);
    Logits work = Describe(logits, targets);
    const Tensor statistics = EmptyOf(logits, {4, work.rows}, ScalarType::Float);
    work.statistics = DataOf<float>(statistics);
    Check(RunLogitStatistics(work, ElementOf(logits, "logit_statistics"), device.stream()));
    return statistics;
}

void LogitGradient(Tensor logits, Tensor targets, Tensor lse, Tensor factors, double hit, double uniform) {
    const Device device(logits);
    Logits work = Describe(logits, targets);
    CheckFits(lse, logits, ScalarType::Float, work.rows, "lse");
    CheckFits(factors, logits, ScalarType::Float, work.rows, "factors");
    work.lse = DataOf<const float>(lse);
    work.factors = DataOf<const float>(factors);
    work.hit = static_cast<float>(hit);
    work.uniform = static_cast<float>(uniform);
    Check(RunLogitGradient(work, ElementOf(logits, "logit_gradient"), device.stream()));
}

}  // namespace
}  // namespace elle_mp

STABLE_TORCH_LIBRARY_IMPL(ELLE_LIBRARY, ELLE_KEY, m) {
    m.impl("logit_statistics", TORCH_BOX(&elle_mp::LogitStatistics));
    m.impl("logit_gradient", TORCH_BOX(&elle_mp::LogitGradient));
}
