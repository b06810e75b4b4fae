// Growth of one matrix in one pass; elle_mp/ops/expand.py says what it computes, and in which steps it
// rounds.
#pragma once

#include <cstdint>

#include "target.h"

namespace elle_mp {

// Rows that a block makes at most, and shared memory that it should take.
constexpr int kMostRows = 4;
constexpr int64_t kUsualShared = 48 << 10, kMostShared = 200 << 10;

struct Expand {
    const void* source;
    void* out;
    int64_t source_stride, out_stride, height;
    int width, rows_in_block;
    const int64_t* rows;      // [height]
    const int32_t* cols;      // [width]
    const double* row_scale;  // [height], or null for ones
    const double* col_scale;  // [width], or null for ones

    // Noise: none where group is null.
    const int32_t* group;    // [width]: which columns are copies of one unit
    const int32_t* members;  // [width]: columns in the order of their groups
    const int32_t* begin;    // [groups + 1]: where a group's begin among them
    const double* factor;    // [groups]
    const uint8_t* silent;   // [height]: rows without noise
    int groups;
    uint64_t noise_key;
    bool alone;  // without the values that it is relative to

    // Random values: none where fresh_rows is null.
    const uint8_t *fresh_rows, *fresh_cols;  // 1: wants them, 2: must have none
    const int32_t* ranks;                    // [width]: of a column among those that want them
    uint64_t fresh_key;
    double fresh_factor;
    int64_t first_row, first_col, first_asked;

    // Counters that the noise of a row takes, 16 columns each.
    ELLE_BOTH int64_t Counters() const { return (first_col % 16 + width + 15) / 16; }
    // Bytes of shared memory that a row takes: a byte for each column, a sum for each group.
    ELLE_BOTH int64_t RowShared() const { return group ? Counters() * 16 + (groups + 3) / 4 * 16 : 0; }
};

// Starts it on a stream, for fp32 and fp64; null, or what went wrong.
const char* RunExpand(const Expand& work, Element type, void* stream);

}  // namespace elle_mp
