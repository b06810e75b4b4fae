// Runs chunks of work on several threads.
#pragma once

#include <cstdint>
#include <functional>

namespace elle_mp {

// Calls body(begin, end) on disjoint ranges that cover [0, count), on up to `threads` threads.
// Where the process has a GNU OpenMP runtime (PyTorch loads one), its thread pool is used: threads of our own
// would fight for the cores with PyTorch's workers, which spin for a while after each operation.
void ParallelFor(int64_t count, int threads, const std::function<void(int64_t, int64_t)>& body);

}  // namespace elle_mp
