// Counter-based dropout of rows.
#pragma once

#include <cstdint>

#include "target.h"

namespace elle_mp {

struct DropRows {
    const void* x;  // [batch, rows, columns], contiguous
    void* out;
    const int64_t* keys;  // [batch]
    int64_t batch, rows, columns, first_row;
    uint32_t threshold;
    double scale;
};

// Starts it on a stream; null, or what went wrong.
const char* RunDropRows(const DropRows& work, Element type, void* stream);

}  // namespace elle_mp
