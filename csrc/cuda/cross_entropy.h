// Rows of logits between the matrix products of a cross entropy; what csrc/ops/cross_entropy_rows.h is on the
// CPU.
#pragma once

#include <cstdint>

#include "target.h"

namespace elle_mp {

struct Logits {
    void* logits;  // [rows, columns], unit stride in columns
    int64_t rows, columns, stride;
    const int64_t* targets;  // [rows]
    // Of each row: the largest, the sum of exp(x - largest), the target's or 0, and the sum. [4, rows]
    float* statistics;
    // Gradient.
    const float *lse, *factors;  // [rows]
    float hit, uniform;
};

// Each starts its kernel on a stream; null, or what went wrong. No fp64.
const char* RunLogitStatistics(const Logits& work, Element type, void* stream);
const char* RunLogitGradient(const Logits& work, Element type, void* stream);

}  // namespace elle_mp
