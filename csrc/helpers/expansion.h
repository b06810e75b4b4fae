// Growths of matrices that are made while Python prepares the next ones.
#pragma once

#include <pybind11/pybind11.h>

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace elle_mp {

// The growth of one matrix, not made yet.
class Expansion {
  public:
    Expansion(int64_t height, int64_t width) : height(height), width(width) {}
    virtual ~Expansion() = default;
    // Finds out what all rows need; once, before them.
    virtual void Prepare(int threads) = 0;
    // Makes some rows.
    virtual void Make(int64_t begin, int64_t end) const = 0;

    const int64_t height, width;
    std::once_flag prepared;
};

// Makes growths in the order they are pushed, some rows at a time and with no wait between one growth and the
// next: on `threads` - 1 threads while Python goes on, and on the caller's as well once it waits. They are no
// threads of OpenMP's, which would hold Python up at the end of each growth; so PyTorch should have no work
// of its own for several threads meanwhile, whose workers spin for a while after it (ExpansionQueue makes the
// zeros for that reason).
class ExpansionQueue {
  public:
    explicit ExpansionQueue(int threads);
    ~ExpansionQueue();
    ExpansionQueue(const ExpansionQueue&) = delete;
    ExpansionQueue& operator=(const ExpansionQueue&) = delete;

    // Keeps `expansion` until Finish.
    void Push(const pybind11::object& expansion);
    // Returns when all that was pushed is made; throws what went wrong.
    void Finish();

  private:
    struct Part {
        Expansion* expansion;
        int64_t begin, end;
    };
    // Does what there is to do; `wait`: until the queue ends, not until it is empty.
    void Work(bool wait);
    void Make(const Part& part);

    std::mutex mutex_;
    std::condition_variable pushed_, done_;
    std::deque<Part> parts_;
    int64_t making_ = 0;  // parts that are taken and not made yet
    bool ending_ = false;
    std::exception_ptr error_;
    std::vector<pybind11::object> held_;
    std::vector<std::thread> threads_;
};

}  // namespace elle_mp
