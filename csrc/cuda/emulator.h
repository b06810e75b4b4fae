// A GPU in plain C++, for tests: blocks run one after the other, the threads of a block as fibers that change
// hands at barriers, shuffles and matrix instructions only.
//
// It is adversarial where hardware may be: shared memory starts as NaNs and ends in a guard, and
// ELLE_MP_EMULATED_ORDER says which thread goes first and when asynchronous copies land: forward, at the last
// moment that WaitCopies allows; reverse, at once; the seed of a random order, now one and now the other,
// with some warps kept waiting for long. A kernel whose result depends on the order has a race. Fragment
// layouts are those of the PTX ISA, sections on ldmatrix and mma.m16n8k16.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#define ELLE_KERNEL(threads) [[maybe_unused]] static void
#define ELLE_DEVICE [[maybe_unused]] static inline
#define ELLE_SHARED static
#define ELLE_UNROLL

namespace elle_mp {
namespace emulator {

constexpr int kLanes = 32;
constexpr int kPosted = 16;  // 32-bit words that a lane shows the others
constexpr int64_t kStack = 128 << 10;
constexpr int64_t kGuard = 256;

struct Copy {
    void* to;
    const void* from;
    int bytes;
};

// A thread of the block that is running.
struct Fiber {
    int thread;
    jmp_buf at;
    ucontext_t start;
    std::unique_ptr<char[]> stack;
    bool done;
    int64_t block_barriers, warp_barriers;  // how many it has come to
    std::vector<std::vector<Copy>> groups;  // of copies that are on their way; the last is open
    uint32_t posted[2][kPosted];            // in turns, so one barrier serves an exchange
};

// Of the threads of a warp or a block: how many run, wait for the next barrier, and barriers that all came
// to.
struct Meeting {
    int64_t alive = 0, waiting = 0, passed = 0;

    void Arrive() {
        ++waiting;
        Check();
    }
    void End() {
        --alive;
        Check();
    }

  private:
    void Check() {
        if (waiting == 0 || waiting < alive) return;
        waiting = 0;
        ++passed;
    }
};

struct Place {
    int thread = 0, threads = 0;
    int64_t x = 0, y = 0, z = 0, grid_x = 0;
    char* shared = nullptr;
};

class Block {
  public:
    Block(int threads, int64_t shared, std::function<void()> body)
        : body_(std::move(body)), memory_(static_cast<std::size_t>(shared + kGuard + 16)), shared_(shared) {
        place_.threads = threads;
        const std::uintptr_t start = reinterpret_cast<std::uintptr_t>(memory_.data());
        place_.shared = memory_.data() + (16 - start % 16) % 16;
        fibers_.resize(static_cast<std::size_t>(threads));
        for (int i = 0; i < threads; ++i) {
            Fiber& fiber = fibers_[static_cast<std::size_t>(i)];
            fiber.thread = i;
            fiber.stack.reset(new char[kStack]);
        }
    }

    static Block*& Current() {
        static thread_local Block* current = nullptr;
        return current;
    }

    const Place& place() const { return place_; }
    Fiber& fiber() { return *running_; }
    Fiber& Lane(int lane) {
        return fibers_[static_cast<std::size_t>(running_->thread / kLanes * kLanes + lane)];
    }

    // One block of the grid; nullptr, or what went wrong.
    const char* Run(int64_t x, int64_t y, int64_t z, int64_t grid_x, const std::string& order) {
        place_.x = x, place_.y = y, place_.z = z, place_.grid_x = grid_x;
        std::memset(place_.shared, 0xff, static_cast<std::size_t>(shared_ + kGuard));
        for (Fiber& fiber : fibers_) {
            fiber.done = false;
            fiber.block_barriers = fiber.warp_barriers = 0;
            fiber.groups.assign(1, {});
            Prepare(fiber);
        }
        all_ = {place_.threads, 0, 0};
        warps_.assign(static_cast<std::size_t>((place_.threads + kLanes - 1) / kLanes), {kLanes, 0, 0});
        error_ = nullptr;
        std::vector<int> turns(fibers_.size());
        std::iota(turns.begin(), turns.end(), 0);
        order_ = order;
        const bool shuffled = order != "forward" && order != "reverse";
        if (order == "reverse") std::reverse(turns.begin(), turns.end());
        random_.seed(
            static_cast<unsigned>(shuffled ? std::strtoul(order.c_str(), nullptr, 10) + x * 31 + y : 0));
        uint32_t held = 0;
        for (;;) {
            // A random order keeps some warps waiting for many rounds, so that others run ahead.
            if (shuffled && random_() % 128 == 0) {
                std::shuffle(turns.begin(), turns.end(), random_);
                held = static_cast<uint32_t>(random_());
            }
            bool moved = false, left = false;
            for (const int turn : turns) {
                Fiber& fiber = fibers_[static_cast<std::size_t>(turn)];
                left |= !fiber.done;
                if (fiber.done || !MayRun(fiber)) continue;
                moved = true;
                if (held >> (turn / kLanes % 32) & 1) continue;
                Enter(fiber);
            }
            if (!left) break;
            if (!moved) return "threads wait for a barrier that others do not reach";
        }
        for (const Fiber& fiber : fibers_)
            for (const auto& group : fiber.groups)
                if (!group.empty()) return "a copy was never waited for";
        for (int64_t i = 0; i < kGuard; ++i)
            if (static_cast<unsigned char>(place_.shared[shared_ + i]) != 0xff)
                return "written behind the shared memory";
        return error_;
    }

    void WaitForBlock() {
        ++running_->block_barriers;
        all_.Arrive();
        Leave();
    }
    void WaitForWarp() {
        ++running_->warp_barriers;
        WarpOf(*running_).Arrive();
        Leave();
    }

    // Whether the next copy lands at once.
    bool Eager() { return order_ == "reverse" || (order_ != "forward" && random_() % 2 == 0); }

    // What the hardware would stop for.
    void Fail(const char* error) { error_ = error; }

  private:
    Meeting& WarpOf(const Fiber& fiber) { return warps_[static_cast<std::size_t>(fiber.thread / kLanes)]; }

    bool MayRun(const Fiber& fiber) {
        return fiber.warp_barriers <= WarpOf(fiber).passed && fiber.block_barriers <= all_.passed;
    }

    // A context is made once and then left and entered by jumps, which make no system call.
    void Prepare(Fiber& fiber) {
        running_ = &fiber;
        if (_setjmp(scheduler_)) return;
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.get();
        fiber.start.uc_stack.ss_size = kStack;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, &Block::Begin, 0);
        setcontext(&fiber.start);
    }

    static void Begin() {
        Block& block = *Current();
        block.Leave();
        block.body_();
        block.running_->done = true;
        block.WarpOf(*block.running_).End();
        block.all_.End();
        _longjmp(block.scheduler_, 1);
    }

    void Enter(Fiber& fiber) {
        running_ = &fiber;
        place_.thread = fiber.thread;
        if (!_setjmp(scheduler_)) _longjmp(fiber.at, 1);
    }
    void Leave() {
        if (!_setjmp(running_->at)) _longjmp(scheduler_, 1);
    }

    std::function<void()> body_;
    std::vector<char> memory_;
    int64_t shared_;
    std::vector<Fiber> fibers_;
    Place place_;
    Meeting all_;
    std::vector<Meeting> warps_;
    std::string order_;
    std::mt19937 random_;
    const char* error_ = nullptr;
    Fiber* running_ = nullptr;
    jmp_buf scheduler_;
};

inline const Place& Here() { return Block::Current()->place(); }
inline void SyncBlock() { Block::Current()->WaitForBlock(); }
inline void SyncWarp() { Block::Current()->WaitForWarp(); }

// Shows `words` to the warp and returns the place where all lanes' are, by lane.
inline int Post(const void* words, std::size_t bytes) {
    Block& block = *Block::Current();
    const int turn = static_cast<int>(block.fiber().warp_barriers & 1);
    std::memcpy(block.fiber().posted[turn], words, bytes);
    block.WaitForWarp();
    return turn;
}

template <typename T>
T Shuffle(T x, int lane) {
    static_assert(sizeof(T) <= sizeof(uint32_t) * kPosted, "too much to show");
    const int turn = Post(&x, sizeof x);
    std::memcpy(&x, Block::Current()->Lane(lane).posted[turn], sizeof x);
    return x;
}

inline void CheckAligned(const void* p) {
    if (reinterpret_cast<std::uintptr_t>(p) % 16)
        Block::Current()->Fail("an address is not a multiple of 16");
}

inline void Land(std::vector<Copy>& group) {
    for (const Copy& copy : group) {
        if (copy.from)
            std::memcpy(copy.to, copy.from, static_cast<std::size_t>(copy.bytes));
        else
            std::memset(copy.to, 0, static_cast<std::size_t>(copy.bytes));
    }
    group.clear();
}
inline void CopyLater(void* to, const void* from, int bytes) {
    CheckAligned(to);
    CheckAligned(from);
    Block& block = *Block::Current();
    std::vector<Copy> now{{to, from, bytes}};
    if (block.Eager())
        Land(now);
    else
        block.fiber().groups.back().push_back(now[0]);
}
inline void CommitCopies() { Block::Current()->fiber().groups.emplace_back(); }
inline void WaitCopies(int left) {
    auto& groups = Block::Current()->fiber().groups;
    while (static_cast<int>(groups.size()) - 1 > left) {
        Land(groups.front());
        groups.erase(groups.begin());
    }
}

inline float FloatOf(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
inline uint16_t ToBFloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
inline float FromHalf(uint16_t bits) {
    _Float16 x;
    std::memcpy(&x, &bits, sizeof x);
    return static_cast<float>(x);
}
inline uint16_t ToHalf(float x) {
    const _Float16 half = static_cast<_Float16>(x);
    uint16_t bits;
    std::memcpy(&bits, &half, sizeof bits);
    return bits;
}

inline void LoadMatrices(uint32_t (&to)[4], const void* row, bool transposed) {
    CheckAligned(row);
    const int turn = Post(row, 16);
    Block& block = *Block::Current();
    const int lane = block.fiber().thread % kLanes;
    for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t halves[2];
        for (int i = 0; i < 2; ++i) {
            const int r = transposed ? lane % 4 * 2 + i : lane / 4,
                      c = transposed ? lane / 4 : lane % 4 * 2 + i;
            const char* from = reinterpret_cast<const char*>(block.Lane(8 * matrix + r).posted[turn]);
            std::memcpy(&halves[i], from + 2 * c, 2);
        }
        to[matrix] = halves[0] | static_cast<uint32_t>(halves[1]) << 16;
    }
}

template <typename F>
void Mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const F& to_float) {
    const uint32_t shown[6] = {a[0], a[1], a[2], a[3], b0, b1};
    const int turn = Post(shown, sizeof shown);
    Block& block = *Block::Current();
    const int lane = block.fiber().thread % kLanes;
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
        float sum = 0.0f;
        for (int k = 0; k < 16; ++k) {
            // Row r, column k of A lies in register (r >= 8) + 2 (k >= 8); row k of B in register k >= 8.
            const uint32_t* from = block.Lane(row % 8 * 4 + k % 8 / 2).posted[turn];
            const uint32_t left = from[row / 8 + 2 * (k / 8)];
            const uint32_t right = block.Lane(column * 4 + k % 8 / 2).posted[turn][4 + k / 8];
            const int shift = k % 2 * 16;
            sum += to_float(static_cast<uint16_t>(left >> shift)) *
                   to_float(static_cast<uint16_t>(right >> shift));
        }
        c[i] += sum;
    }
}

template <typename F>
const char* Run(int64_t grid_x, int64_t grid_y, int64_t grid_z, int threads, int64_t shared, const F& body) {
    const char* chosen = std::getenv("ELLE_MP_EMULATED_ORDER");
    const std::string order = chosen ? chosen : "forward";
    if (threads > 1024 || shared > 227 * 1024) return "more than a block may have";
    if (grid_y > 65535 || grid_z > 65535) return "more blocks than a grid may have";
    Block block(threads, shared, body);
    Block::Current() = &block;
    const char* error = nullptr;
    for (int64_t z = 0; z < grid_z && !error; ++z)
        for (int64_t y = 0; y < grid_y && !error; ++y)
            for (int64_t x = 0; x < grid_x && !error; ++x) error = block.Run(x, y, z, grid_x, order);
    Block::Current() = nullptr;
    return error;
}

}  // namespace emulator
}  // namespace elle_mp
