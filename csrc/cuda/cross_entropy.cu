#include <cmath>
#include <type_traits>

#include "cross_entropy.h"
#include "rows.cuh"

namespace elle_mp {
namespace {

constexpr int kThreads = 512;
constexpr float kLog2E = 1.44269504088896340736f;

// The largest of some numbers, and the sum of their distances to it, exponentiated.
struct Softmax {
    float top = -INFINITY, sum = 0.0f;

    template <int kCount>
    ELLE_METHOD void Add(const float* x) {
        float most = top;
        ELLE_UNROLL
        for (int i = 0; i < kCount; ++i) most = Larger(most, x[i]);
        // Where nothing but -inf has come, there is nothing to scale.
        const float shift = most == -INFINITY ? 0.0f : most;
        sum *= Exp2((top - shift) * kLog2E);
        ELLE_UNROLL
        for (int i = 0; i < kCount; ++i) sum += Exp2((x[i] - shift) * kLog2E);
        top = most;
    }
    ELLE_METHOD void ScaleTo(float most) {
        sum *= most == -INFINITY ? 0.0f : Exp2((top - most) * kLog2E);
        top = most;
    }
};

// A block for each row.
template <typename T>
ELLE_KERNEL(kThreads)
Statistics(Logits work) {
    ELLE_SHARED float tops[kWarp];
    ELLE_SHARED float scratch[2 * kWarp];
    const int64_t r = BlockX();
    const T* row = static_cast<const T*>(work.logits) + r * work.stride;
    Softmax softmax;
    float plain = 0.0f;
    ReadRow(row, work.columns, [&](int64_t, auto count, const float* x) {
        constexpr int kCount = decltype(count)::value;
        softmax.Add<kCount>(x);
        ELLE_UNROLL
        for (int i = 0; i < kCount; ++i) plain += x[i];
    });
    const float warp_top = WarpMax(softmax.top);
    if (ThreadIndex() % kWarp == 0) tops[ThreadIndex() / kWarp] = warp_top;
    SyncThreads();
    float top = -INFINITY;
    for (int w = 0; w < kThreads / kWarp; ++w) top = Larger(top, tops[w]);
    softmax.ScaleTo(top);
    float sums[2] = {softmax.sum, plain};
    BlockSums(sums, scratch);
    if (ThreadIndex() != 0) return;
    const int64_t target = work.targets[r];
    const bool inside = target >= 0 && target < work.columns;
    work.statistics[r] = top;
    work.statistics[work.rows + r] = sums[0];
    work.statistics[2 * work.rows + r] = inside ? ToFloat(row[target]) : 0.0f;
    work.statistics[3 * work.rows + r] = sums[1];
}

template <typename T>
ELLE_KERNEL(kThreads)
Gradient(Logits work) {
    const int64_t r = BlockX(), target = work.targets[r];
    T* row = static_cast<T*>(work.logits) + r * work.stride;
    const float lse = work.lse[r], factor = work.factors[r];
    MapRow(row, row, work.columns, [&](int64_t i, float x) {
        if (factor == 0.0f) return 0.0f;
        const float weight = factor * Exp2((x - lse) * kLog2E) - work.uniform;
        return i == target ? weight - work.hit : weight;
    });
}

}  // namespace

const char* RunLogitStatistics(const Logits& work, Element type, void* stream) {
    return WithFloatElement(type, [&](auto element) {
        return Launch(Statistics<decltype(element)>, {work.rows, 1, 1}, kThreads, 0, stream, work);
    });
}

const char* RunLogitGradient(const Logits& work, Element type, void* stream) {
    return WithFloatElement(type, [&](auto element) {
        return Launch(Gradient<decltype(element)>, {work.rows, 1, 1}, kThreads, 0, stream, work);
    });
}

}  // namespace elle_mp
