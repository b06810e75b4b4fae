// The gradient of a table that rows were looked up in, without atomics: the same bits every time.
#pragma once

#include <cstdint>

#include "target.h"

namespace elle_mp {

struct TableGradient {
    const void* grad;      // [count, columns], contiguous
    const int64_t* ids;    // [count], ascending: rows of the table; others are left out
    const int64_t* order;  // [count]: which row of grad each id is of
    void* out;             // [rows, columns]
    int64_t count, rows, columns;
    bool aligned;  // rows start at multiples of 16 bytes, and consist of as many
};

// Starts it on a stream; null, or what went wrong.
const char* RunTableGradient(const TableGradient& work, Element type, void* stream);

}  // namespace elle_mp
