#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace elle_mp {
namespace {

// Pieces per thread: small enough that a thread held up by another process delays the others little.
constexpr int64_t kPieces = 8;

struct Work {
    const std::function<void(int64_t, int64_t)>* body;
    std::atomic<int64_t> next;
    int64_t count;
    int64_t step;
};

void Run(void* data) {
    Work* work = static_cast<Work*>(data);
    for (;;) {
        const int64_t begin = work->next.fetch_add(work->step);
        if (begin >= work->count) return;
        (*work->body)(begin, std::min(work->count, begin + work->step));
    }
}

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel FindGomp() {
#if defined(__unix__) || defined(__APPLE__)
    return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#else
    return nullptr;
#endif
}

}  // namespace

void ParallelFor(int64_t count, int threads, const std::function<void(int64_t, int64_t)>& body) {
    if (count <= 0) return;
    if (threads <= 1 || count == 1) {
        body(0, count);
        return;
    }
    Work work{&body, {0}, count, std::max<int64_t>(1, count / (threads * kPieces))};
    if (const GompParallel gomp = FindGomp()) {
        gomp(Run, &work, static_cast<unsigned>(threads), 0);
        return;
    }
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(Run, &work);
    Run(&work);
    for (std::thread& other : others) other.join();
}

}  // namespace elle_mp
