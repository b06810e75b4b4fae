// LayerNorm, with weighted statistics too, and RMSNorm of h = residual + dropout(x), in one pass over memory;
// what csrc/ops/norm_rows.h is on the CPU.
#pragma once

#include <cstdint>

#include "target.h"

namespace elle_mp {

// Columns that a block's shared memory has room for.
constexpr int64_t kMostColumns = 24 << 10;
// Rows that one block sums for the gradients of weight and bias, at least, and blocks, at most: neither
// depends on the GPU.
constexpr int64_t kNormRows = 4, kNormBlocks = 1056;

struct NormRows {
    int64_t rows, columns;
    bool aligned;  // all rows start at multiples of 16 bytes, and consist of as many
    bool rms;
    float eps;
    const float* weight;        // [columns]
    const float* bias;          // [columns], or null
    const float* stat_weights;  // [columns], or null for 1 / columns each
    float* mean;                // [rows]
    float* rstd;
    // Dropout: none where the threshold is 0. Row r has key r / run, and is row first_row + r % run of its
    // mask.
    const int64_t* keys;
    int64_t run, first_row;
    uint32_t threshold;
    float keep_scale;

    // Forward. [rows, columns], contiguous, as all below.
    const void *x, *residual;  // residual may be null
    void *h, *y;               // h is null where it is x

    // Backward.
    const void *kept, *dy, *dh;  // kept is h; dh may be null
    void *d_residual, *d_x;      // d_x is null where it is d_residual
    int64_t rows_in_block, blocks;
    float* parts;  // [blocks, 2, columns]: of d_weight and d_bias
    float* sums;   // [2, columns]
};

// Each starts its kernels on a stream, for all types but fp64; null, or what went wrong.
const char* RunAddNorm(const NormRows& work, Element type, void* stream);
const char* RunAddNormBackward(const NormRows& work, Element type, void* stream);

}  // namespace elle_mp
