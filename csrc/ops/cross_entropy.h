// The elementwise passes of a cross entropy: statistics of rows of logits, and their gradient.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace elle_mp {

using torch::stable::Tensor;

// logits [n, V] (unit stride in V), targets int64 [n] -> fp32 [4, n]: the largest logit, the sum of
// exp(logit - largest), the logit of the target (0 where it is not in [0, V)), and the sum of the logits.
Tensor LogitStatistics(Tensor logits, Tensor targets);
// In place: factor * exp(logit - lse) - uniform, and less `hit` at the target; 0 in rows of factor 0. lse and
// factors are fp32 [n].
void LogitGradient(Tensor logits, Tensor targets, Tensor lse, Tensor factors, double hit, double uniform);

}  // namespace elle_mp
