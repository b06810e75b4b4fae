// The elementwise passes of attention and cross entropy, between the GEMMs that PyTorch does: softmax with
// dropout, its backward, and the softmax gradient of a row of logits. bfloat16 as uint16; statistics in fp32.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <vector>

#include "counter.h"
#include "parallel.h"

#if defined(__GNUC__) && !defined(__clang__)
// These sums need not equal another implementation bit for bit, and fused multiply-adds are twice as fast.
#pragma GCC optimize("fp-contract=fast")
#endif

namespace py = pybind11;

namespace elle_mp {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();

// One block of attention scores: [B, H, Q, K] with unit stride in K.
struct Scores {
    void* scores;
    void* grads;
    float* lse;
    const int64_t* keys;
    int64_t heads, queries, columns;
    int64_t stride[3];      // of scores and grads, in elements
    int64_t lse_stride[3];  // [B, H, Q]
    int64_t first_head, first_query, length;
    bool causal;
    uint32_t threshold;
    float scale, keep_scale;
};

// calls f(column, lanes, mask half) over a row, 32 columns at a time, with the mask only where there is
// dropout.
template <bool kDrop, typename F>
ELLE_INLINE void ForColumns(const MaskRow& mask, int64_t columns, const F& f) {
    const I32 all = ~I32{};
    int64_t column = 0;
    for (; column + kMaskColumns <= columns; column += kMaskColumns) {
        const Keep keep = kDrop ? mask.At(column) : Keep{all, all};
        f(column, kLanes, keep.low);
        f(column + kLanes, kLanes, keep.high);
    }
    if (column == columns) return;
    const Keep keep = kDrop ? mask.At(column) : Keep{all, all};
    f(column, static_cast<int>(std::min<int64_t>(kLanes, columns - column)), keep.low);
    if (columns - column > kLanes) f(column + kLanes, static_cast<int>(columns - column - kLanes), keep.high);
}

template <typename T>
ELLE_INLINE F32 Read(const T* p, int lanes, float rest) {
    return lanes == kLanes ? Load(p) : LoadTail(p, lanes, rest);
}

template <typename T>
ELLE_INLINE void Write(T* p, F32 x, int lanes) {
    if (lanes == kLanes)
        Store(p, x);
    else
        StoreTail(p, x, lanes);
}

// Buffers of floats in rows of whole vectors.
inline int64_t Padded(int64_t columns) { return (columns + kMaskColumns - 1) / kMaskColumns * kMaskColumns; }

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

template <typename T, bool kDrop>
ELLE_INLINE void ForwardRow(const Scores& work, T* row, float* lse, const MaskRow& mask, int64_t seen,
                            float* buffer) {
    const float top = RowMax(row, seen);
    const F32 scale = Fill(work.scale), shift = Fill(-top * work.scale);
    F32 sum = Fill(0.0f);
    int64_t column = 0;
    for (; column + kLanes <= seen; column += kLanes) {
        const F32 e = Exp(Load(row + column) * scale + shift);
        sum += e;
        Store(buffer + column, e);
    }
    if (column < seen) {
        const F32 e = Exp(LoadTail(row + column, static_cast<int>(seen - column), kLowest) * scale + shift);
        sum += e;
        Store(buffer + column, e);
    }
    const float total = Sum(sum);
    *lse = top * work.scale + std::log(total);
    const F32 factor = Fill(work.keep_scale / total);
    ForColumns<kDrop>(mask, seen, [&](int64_t c, int lanes, I32 keep) ELLE_LAMBDA {
        F32 p = Load(buffer + c) * factor;
        if (kDrop) p = (F32)((I32)p & keep);
        Write(row + c, p, lanes);
    });
}

// ds = p (m dp / keep - sum_k p m dp / keep) scale; the dropped weights replace the scores and ds replaces
// dp.
template <typename T, bool kDrop>
ELLE_INLINE void BackwardRow(const Scores& work, T* row, T* grad, float lse, const MaskRow& mask,
                             int64_t seen, float* buffer) {
    const F32 scale = Fill(work.scale), shift = Fill(-lse), keep_scale = Fill(work.keep_scale);
    float* weights = buffer;
    float* products = buffer + Padded(seen);
    F32 sum = Fill(0.0f);
    ForColumns<kDrop>(mask, seen, [&](int64_t c, int lanes, I32 keep) ELLE_LAMBDA {
        const F32 p = Exp(Read(row + c, lanes, kLowest) * scale + shift);
        F32 dp = Read(grad + c, lanes, 0.0f);
        F32 dropped = p;
        if (kDrop) {
            dp = (F32)((I32)(dp * keep_scale) & keep);
            dropped = (F32)((I32)(p * keep_scale) & keep);
        }
        Write(row + c, dropped, lanes);
        const F32 product = p * dp;
        sum += product;
        Store(weights + c, p);
        Store(products + c, product);
    });
    const F32 delta = Fill(Sum(sum));
    ForColumns<false>(mask, seen, [&](int64_t c, int lanes, I32) ELLE_LAMBDA {
        Write(grad + c, (Load(products + c) - Load(weights + c) * delta) * scale, lanes);
    });
}

template <typename T, bool kDrop, bool kBackward>
ELLE_INLINE void Rows(const Scores& work, int64_t begin, int64_t end) {
    std::vector<float> buffer(2 * Padded(work.columns));
    for (int64_t r = begin; r < end; ++r) {
        const int64_t query = r % work.queries, head = r / work.queries % work.heads;
        const int64_t sample = r / (work.queries * work.heads);
        const int64_t offset = sample * work.stride[0] + head * work.stride[1] + query * work.stride[2];
        const int64_t place = work.first_query + query;
        const int64_t seen = work.causal ? std::min(work.columns, place + 1) : work.columns;
        const MaskRow mask(static_cast<uint64_t>(work.keys[sample]),
                           (work.first_head + head) * work.length + place, work.threshold);
        float* lse =
            work.lse + sample * work.lse_stride[0] + head * work.lse_stride[1] + query * work.lse_stride[2];
        T* row = static_cast<T*>(work.scores) + offset;
        T* grad = static_cast<T*>(work.grads) + offset;
        if (kBackward)
            BackwardRow<T, kDrop>(work, row, grad, *lse, mask, seen, buffer.data());
        else
            ForwardRow<T, kDrop>(work, row, lse, mask, seen, buffer.data());
        std::memset(static_cast<void*>(row + seen), 0, (work.columns - seen) * sizeof(T));
        if (kBackward) std::memset(static_cast<void*>(grad + seen), 0, (work.columns - seen) * sizeof(T));
    }
}

template <typename T, bool kBackward>
ELLE_INLINE void AnyRows(const Scores& work, int64_t begin, int64_t end) {
    if (work.threshold == 0)
        Rows<T, false, kBackward>(work, begin, end);
    else
        Rows<T, true, kBackward>(work, begin, end);
}

ELLE_SIMD void ForwardBFloat16(const Scores& work, int64_t begin, int64_t end) {
    AnyRows<BFloat16, false>(work, begin, end);
}
ELLE_SIMD void ForwardFloat(const Scores& work, int64_t begin, int64_t end) {
    AnyRows<float, false>(work, begin, end);
}
ELLE_SIMD void BackwardBFloat16(const Scores& work, int64_t begin, int64_t end) {
    AnyRows<BFloat16, true>(work, begin, end);
}
ELLE_SIMD void BackwardFloat(const Scores& work, int64_t begin, int64_t end) {
    AnyRows<float, true>(work, begin, end);
}

template <typename T>
Scores Describe(py::array_t<T>& scores, py::array_t<float>& lse, const py::array_t<int64_t>& keys,
                int64_t first_head, int64_t first_query, int64_t length, bool causal, uint32_t threshold,
                float scale, float keep_scale) {
    if (scores.ndim() != 4 || (scores.shape(3) > 1 && scores.strides(3) != sizeof(T)))
        throw std::invalid_argument("scores must be [B, H, Q, K] with unit stride in K");
    if (keys.size() != scores.shape(0) || lse.ndim() != 3)
        throw std::invalid_argument("keys must be [B] and lse [B, H, Q]");
    for (int i = 0; i < 3; ++i)
        if (lse.shape(i) != scores.shape(i)) throw std::invalid_argument("lse must be [B, H, Q]");
    Scores work{};
    work.scores = scores.mutable_data();
    work.lse = lse.mutable_data();
    work.keys = keys.data();
    work.heads = scores.shape(1);
    work.queries = scores.shape(2);
    work.columns = scores.shape(3);
    for (int i = 0; i < 3; ++i) {
        work.stride[i] = scores.strides(i) / static_cast<int64_t>(sizeof(T));
        work.lse_stride[i] = lse.strides(i) / static_cast<int64_t>(sizeof(float));
    }
    work.first_head = first_head;
    work.first_query = first_query;
    work.length = length;
    work.causal = causal;
    work.threshold = threshold;
    work.scale = scale;
    work.keep_scale = keep_scale;
    return work;
}

template <typename T>
void SoftmaxForward(py::array_t<T> scores, py::array_t<float> lse, py::array_t<int64_t> keys,
                    int64_t first_head, int64_t first_query, int64_t length, bool causal, uint32_t threshold,
                    float scale, float keep_scale, int threads) {
    const Scores work =
        Describe(scores, lse, keys, first_head, first_query, length, causal, threshold, scale, keep_scale);
    const int64_t rows = lse.size();
    py::gil_scoped_release release;
    ParallelFor(rows, threads, [&work](int64_t begin, int64_t end) {
        sizeof(T) == 2 ? ForwardBFloat16(work, begin, end) : ForwardFloat(work, begin, end);
    });
}

template <typename T>
void SoftmaxBackward(py::array_t<T> scores, py::array_t<T> grads, py::array_t<float> lse,
                     py::array_t<int64_t> keys, int64_t first_head, int64_t first_query, int64_t length,
                     bool causal, uint32_t threshold, float scale, float keep_scale, int threads) {
    Scores work =
        Describe(scores, lse, keys, first_head, first_query, length, causal, threshold, scale, keep_scale);
    for (int i = 0; i < 4; ++i)
        if (grads.ndim() != 4 || grads.shape(i) != scores.shape(i) || grads.strides(i) != scores.strides(i))
            throw std::invalid_argument("grads must be laid out as scores");
    work.grads = grads.mutable_data();
    const int64_t rows = lse.size();
    py::gil_scoped_release release;
    ParallelFor(rows, threads, [&work](int64_t begin, int64_t end) {
        sizeof(T) == 2 ? BackwardBFloat16(work, begin, end) : BackwardFloat(work, begin, end);
    });
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

// Arrays are written in place, so another type is an error and not a reason to convert a copy.
template <typename T>
void RegisterScores(py::module_& m) {
    using py::arg;
    m.def("softmax_forward", &SoftmaxForward<T>, arg("scores").noconvert(), arg("lse").noconvert(),
          arg("keys").noconvert(), arg("first_head"), arg("first_query"), arg("length"), arg("causal"),
          arg("threshold"), arg("scale"), arg("keep_scale"), arg("threads"),
          "Scores [B, H, Q, K] become dropped softmax weights in place; lse [B, H, Q] is written.");
    m.def("softmax_backward", &SoftmaxBackward<T>, arg("scores").noconvert(), arg("grads").noconvert(),
          arg("lse").noconvert(), arg("keys").noconvert(), arg("first_head"), arg("first_query"),
          arg("length"), arg("causal"), arg("threshold"), arg("scale"), arg("keep_scale"), arg("threads"),
          "Scores become the dropped weights again; grads (of those) become grads of q k^T.");
}

}  // namespace

void register_softmax(py::module_& m) {
    using py::arg;
    RegisterScores<uint16_t>(m);
    RegisterScores<float>(m);
    m.def("logit_stats", &LogitStats, arg("logits").noconvert(), arg("top").noconvert(),
          arg("sum").noconvert(), arg("threads"),
          "Maximum and sum of exp(x - maximum) of each row of logits [n, V].");
    m.def("logit_gradient", &LogitGradient, arg("logits").noconvert(), arg("lse").noconvert(),
          arg("targets").noconvert(), arg("threads"),
          "Logits [n, V] become softmax - onehot(targets) in place, given lse [n].");
}

}  // namespace elle_mp
