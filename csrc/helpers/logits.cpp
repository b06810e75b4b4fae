// The elementwise passes of cross entropy, between the GEMMs that PyTorch does: statistics of rows of logits,
// and their softmax gradient. bfloat16 as uint16; statistics in fp32.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>

#include "parallel.h"
#include "simd.h"

#if defined(__GNUC__) && !defined(__clang__)
// These sums need not equal another implementation bit for bit, and fused multiply-adds are twice as fast.
#pragma GCC optimize("fp-contract=fast")
#endif

namespace py = pybind11;

namespace elle_mp {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();

template <typename T>
ELLE_INLINE F32 Read(const T* p, int lanes, float rest) {
    return lanes == kLanes ? Load(p) : LoadTail(p, lanes, rest);
}

template <typename T>
ELLE_INLINE float RowMax(const T* row, int64_t columns) {
    F32 a = Fill(kLowest), b = a;
    int64_t column = 0;
    for (; column + 2 * kLanes <= columns; column += 2 * kLanes) {
        a = Max(a, Load(row + column));
        b = Max(b, Load(row + column + kLanes));
    }
    for (; column < columns; column += kLanes)
        a = Max(a,
                Read(row + column, static_cast<int>(std::min<int64_t>(kLanes, columns - column)), kLowest));
    return Top(Max(a, b));
}

// Rows of logits [n, V] with their statistics.
struct Logits {
    BFloat16* logits;
    int64_t columns;
    float* top;
    float* sum;
    const float* lse;
    const int64_t* targets;
};

ELLE_SIMD void StatsRows(const Logits& work, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
        const BFloat16* row = work.logits + r * work.columns;
        const float top = RowMax(row, work.columns);
        F32 a = Fill(0.0f), b = a;
        int64_t column = 0;
        for (; column + 2 * kLanes <= work.columns; column += 2 * kLanes) {
            a += Exp(Load(row + column) - top);
            b += Exp(Load(row + column + kLanes) - top);
        }
        for (; column < work.columns; column += kLanes) {
            const int lanes = static_cast<int>(std::min<int64_t>(kLanes, work.columns - column));
            a += Exp(Read(row + column, lanes, kLowest) - top);
        }
        work.top[r] = top;
        work.sum[r] = Sum(a + b);
    }
}

ELLE_SIMD void GradientRows(const Logits& work, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
        BFloat16* row = work.logits + r * work.columns;
        const int64_t target = work.targets[r];
        const bool inside = target >= 0 && target < work.columns;
        float at_target = 0.0f;
        if (inside) {
            const uint32_t bits = static_cast<uint32_t>(row[target].bits) << 16;
            std::memcpy(&at_target, &bits, sizeof at_target);
        }
        const F32 lse = Fill(work.lse[r]);
        int64_t column = 0;
        for (; column + kLanes <= work.columns; column += kLanes)
            Store(row + column, Exp(Load(row + column) - lse));
        if (column < work.columns) {
            const int lanes = static_cast<int>(work.columns - column);
            StoreTail(row + column, Exp(LoadTail(row + column, lanes, kLowest) - lse), lanes);
        }
        if (inside) {
            BFloat16 lanes[kLanes];
            Store(lanes, Exp(Fill(at_target) - lse) - 1.0f);
            row[target] = lanes[0];
        }
    }
}

Logits DescribeLogits(py::array_t<uint16_t, py::array::c_style>& logits, py::ssize_t rows) {
    if (logits.ndim() != 2 || logits.shape(0) != rows)
        throw std::invalid_argument("logits must be [n, V] and the others [n]");
    Logits work{};
    work.logits = reinterpret_cast<BFloat16*>(logits.mutable_data());
    work.columns = logits.shape(1);
    return work;
}

void LogitStats(py::array_t<uint16_t, py::array::c_style> logits, py::array_t<float, py::array::c_style> top,
                py::array_t<float, py::array::c_style> sum, int threads) {
    Logits work = DescribeLogits(logits, top.size());
    if (sum.size() != top.size()) throw std::invalid_argument("top and sum must be [n]");
    work.top = top.mutable_data();
    work.sum = sum.mutable_data();
    const int64_t rows = top.size();
    py::gil_scoped_release release;
    ParallelFor(rows, threads, [&work](int64_t begin, int64_t end) { StatsRows(work, begin, end); });
}

void LogitGradient(py::array_t<uint16_t, py::array::c_style> logits,
                   py::array_t<float, py::array::c_style> lse,
                   py::array_t<int64_t, py::array::c_style> targets, int threads) {
    Logits work = DescribeLogits(logits, lse.size());
    if (targets.size() != lse.size()) throw std::invalid_argument("lse and targets must be [n]");
    work.lse = lse.data();
    work.targets = targets.data();
    const int64_t rows = lse.size();
    py::gil_scoped_release release;
    ParallelFor(rows, threads, [&work](int64_t begin, int64_t end) { GradientRows(work, begin, end); });
}

}  // namespace

void register_logits(py::module_& m) {
    using py::arg;
    // Arrays are written in place, so another type is an error and not a reason to convert a copy.
    m.def("logit_stats", &LogitStats, arg("logits").noconvert(), arg("top").noconvert(),
          arg("sum").noconvert(), arg("threads"),
          "Maximum and sum of exp(x - maximum) of each row of logits [n, V].");
    m.def("logit_gradient", &LogitGradient, arg("logits").noconvert(), arg("lse").noconvert(),
          arg("targets").noconvert(), arg("threads"),
          "Logits [n, V] become softmax - onehot(targets) in place, given lse [n].");
}

}  // namespace elle_mp
