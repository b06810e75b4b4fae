#include "expansion.h"

#include <algorithm>
#include <utility>

namespace py = pybind11;

namespace elle_mp {
namespace {

// Entries of a part: enough to pay for taking it, few enough that the last one keeps nobody waiting long.
constexpr int64_t kPartEntries = 1 << 20;

}  // namespace

ExpansionQueue::ExpansionQueue(int threads) {
    for (int i = 1; i < threads; ++i) threads_.emplace_back([this] { Work(true); });
}

ExpansionQueue::~ExpansionQueue() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        ending_ = true;
        parts_.clear();
    }
    pushed_.notify_all();
    // They need no GIL.
    for (std::thread& thread : threads_) thread.join();
}

void ExpansionQueue::Push(const py::object& expansion) {
    auto* work = expansion.cast<Expansion*>();
    if (work->height == 0 || work->width == 0) return;
    held_.push_back(expansion);
    const int64_t step = std::max<int64_t>(1, kPartEntries / work->width);
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        for (int64_t begin = 0; begin < work->height; begin += step)
            parts_.push_back({work, begin, std::min(begin + step, work->height)});
    }
    pushed_.notify_all();
}

void ExpansionQueue::Finish() {
    {
        const py::gil_scoped_release release;
        Work(false);
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return making_ == 0; });
    }
    held_.clear();
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void ExpansionQueue::Work(bool wait) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
        if (wait) pushed_.wait(lock, [this] { return ending_ || !parts_.empty(); });
        if (parts_.empty()) return;
        const Part part = parts_.front();
        parts_.pop_front();
        ++making_;
        lock.unlock();
        Make(part);
        lock.lock();
        if (--making_ == 0) done_.notify_all();
    }
}

void ExpansionQueue::Make(const Part& part) {
    try {
        std::call_once(part.expansion->prepared, [&part] { part.expansion->Prepare(1); });
        part.expansion->Make(part.begin, part.end);
    } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!error_) error_ = std::current_exception();
    }
}

}  // namespace elle_mp
