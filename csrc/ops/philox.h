// Standard normal numbers from Philox4x32-10, one for each number of a stream. elle_mp/ops/random.py is the
// NumPy twin: the same bits go in, and what comes out differs by rounding.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace elle_mp {

// Fills out, fp32 [R, C] with contiguous columns: out[i, j] is number start + i * stride + j of the stream
// `key`.
void PhiloxNormal(torch::stable::Tensor out, int64_t key, int64_t start, int64_t stride);

}  // namespace elle_mp
