// Attention, backward: scores and masks are computed again, block by block, from the log-sum-exp of each
// query.
//
// With P the weights, M the mask with its scale, D = dO V^T and delta = sum(dO O) - dlse for each query:
// dV = (M P)^T dO, dS = P (M D - delta), dQ = scale dS K, dK = scale dS^T Q. One thread does all that adds to
// the gradients of one kv head, head after head and block after block, so no sum depends on the number of
// threads.
#pragma once

#include "attention_forward.h"

namespace elle_mp {
namespace ELLE_LEVEL {

template <typename Unit>
struct BackwardBuffers {
    typedef typename Unit::Element Element;
    // Of all keys.
    float *k, *k_interleaved, *v;  // natural but for the second
    float *dk, *dv;                // [keys, dim]
    // Of 64 queries.
    float *q, *q_transposed, *q_interleaved;
    float *grad, *grad_transposed, *grad_interleaved;
    float* dq;  // [dim, 64]
    // Of a block [keys, 64].
    float *scores, *products;
    float *weights, *d_scores, *d_scores_interleaved;
    float* rows;  // [16, dim]
    int64_t floats;

    ELLE_INLINE BackwardBuffers(const Attention& work, float* buffer) {
        Pieces pieces(buffer);
        constexpr bool kPairs = Unit::kUnit == 2;
        const int64_t wide = RoundUp(work.dim), keys = PaddedKeys(work), units = wide / Unit::kUnit;
        k = pieces.Take(keys * units);
        k_interleaved = kPairs ? pieces.Take(keys * units) : k;
        v = pieces.Take(keys * units);
        dk = pieces.Take(keys * wide);
        dv = pieces.Take(keys * wide);
        TakeQueries(pieces, units, q, q_transposed, q_interleaved);
        TakeQueries(pieces, units, grad, grad_transposed, grad_interleaved);
        dq = pieces.Take(wide * kBlockQueries);
        constexpr int64_t kBlock = kBlockKeys * kBlockQueries;
        scores = pieces.Take(kBlock);
        products = pieces.Take(kBlock);
        // A float fits where the score was; of pairs each operand has its own form.
        weights = kPairs ? pieces.Take(kBlock / 2) : scores;
        d_scores = kPairs ? pieces.Take(kBlock / 2) : products;
        d_scores_interleaved = kPairs ? pieces.Take(kBlock / 2) : products;
        rows = pieces.Take(kGroup * wide);
        floats = pieces.taken();
    }

  private:
    static ELLE_INLINE void TakeQueries(Pieces& pieces, int64_t units, float*& natural, float*& transposed,
                                        float*& interleaved) {
        natural = pieces.Take(kBlockQueries * units + kGroup);
        transposed = pieces.Take(RoundUp(units) * kBlockQueries);
        interleaved = Unit::kUnit == 2 ? pieces.Take(kBlockQueries * units) : natural;
    }
};

template <typename T, typename Unit>
ELLE_INLINE void PackBoth(const T* from, int64_t row, int64_t rows, int64_t padded, int64_t dim,
                          float* natural, float* interleaved) {
    typedef typename Unit::Element E;
    PackNatural(from, row, rows, padded, dim, reinterpret_cast<E*>(natural));
    if constexpr (Unit::kUnit == 2)
        Interleave(reinterpret_cast<E*>(natural), padded, RoundUp(dim), interleaved);
}

template <typename T>
ELLE_INLINE float Dot(const T* a, const T* b, int64_t dim) {
    Vec sum = Fill(0.0f);
    int64_t d = 0;
    for (; d + kWidth <= dim; d += kWidth) sum += Load(a + d) * Load(b + d);
    float total = Sum(sum);
    for (; d < dim; ++d) total += ToFloat(a[d]) * ToFloat(b[d]);
    return total;
}

// Of each of 64 queries: delta, and the log-sum-exp to the base 2, infinite where there is no weight.
struct Statistics {
    float delta[kBlockQueries], lse[kBlockQueries];
};

template <typename T>
ELLE_INLINE void ReadStatistics(const Attention& work, int64_t sample, int64_t head, int64_t first,
                                int64_t count, Statistics& to) {
    const int64_t at = (sample * work.heads + head) * work.queries + first;
    for (int64_t i = 0; i < kBlockQueries; ++i) {
        to.delta[i] = 0.0f;
        to.lse[i] = -kLowest;
        if (i >= count) continue;
        to.delta[i] = Dot(RowOf<T>(work.mixed, sample, head, first + i),
                          RowOf<T>(work.grad, sample, head, first + i), work.dim);
        if (work.grad_lse) to.delta[i] -= work.grad_lse[at + i];
        if (work.lse[at + i] != kLowest) to.lse[i] = work.lse[at + i] * kLog2E;
    }
}

// Scores and products D become dropped weights and the gradients of scores (without their scale).
template <typename Unit, bool kMasked, bool kDrop>
ELLE_INLINE void BlockGradients(const Attention& work, const Queries& queries, const KeyBlock& block,
                                const Statistics& statistics, const BackwardBuffers<Unit>& buffers) {
    const Vec scale = Fill(work.scale * kLog2E), keep_scale = Fill(work.keep_scale);
    for (int64_t lane = block.first * kGroup; lane < block.end * kGroup; lane += kWidth) {
        const Vec lse = Load(statistics.lse + lane), delta = Load(statistics.delta + lane);
        for (int64_t j = 0; j < block.count; j += 2) {
            const int64_t at = j * kBlockQueries + lane;
            Vec p[2], dp[2];
#pragma GCC unroll 2
            for (int i = 0; i < 2; ++i) {
                p[i] = Exp2<Unit::kPrecise>(Load(buffers.scores + at + i * kBlockQueries) * scale - lse);
                dp[i] = Load(buffers.products + at + i * kBlockQueries);
                if (kMasked) p[i] = (Vec)((Int)p[i] & queries.Sees(lane, block.begin + j + i));
            }
            Vec dropped[2] = {p[0], p[1]};
            if (kDrop) {
                Int keep[2];
                queries.Keep(lane, block.begin + j, keep[0], keep[1]);
#pragma GCC unroll 2
                for (int i = 0; i < 2; ++i) {
                    dropped[i] = (Vec)((Int)p[i] & keep[i]);
                    dp[i] = (Vec)((Int)(dp[i] * keep_scale) & keep[i]);
                }
            }
            const Vec even = p[0] * (dp[0] - delta), odd = p[1] * (dp[1] - delta);
            if constexpr (Unit::kUnit == 2) {
                Unit::StoreRows(buffers.weights + at / 2, kBlockQueries / 2,
                                Unit::Round(dropped[0], dropped[1]));
                const auto rounded = Unit::Round(even, odd);
                Unit::StoreRows(buffers.d_scores + at / 2, kBlockQueries / 2, rounded);
                Unit::StoreUnits(buffers.d_scores_interleaved + j / 2 * kBlockQueries + lane, rounded);
            } else {
                Store(buffers.scores + at, dropped[0]);
                Store(buffers.scores + at + kBlockQueries, dropped[1]);
                Store(buffers.products + at, even);
                Store(buffers.products + at + kBlockQueries, odd);
            }
        }
    }
}

template <typename Unit>
ELLE_NOINLINE void AnyBlockGradients(const Attention& work, const Queries& queries, const KeyBlock& block,
                                     const Statistics& statistics, const BackwardBuffers<Unit>& buffers) {
    const bool drop = work.threshold > 0;
    if (block.masked && drop)
        BlockGradients<Unit, true, true>(work, queries, block, statistics, buffers);
    else if (block.masked)
        BlockGradients<Unit, true, false>(work, queries, block, statistics, buffers);
    else if (drop)
        BlockGradients<Unit, false, true>(work, queries, block, statistics, buffers);
    else
        BlockGradients<Unit, false, false>(work, queries, block, statistics, buffers);
}

// One block of queries: its part of dK and dV is added, its dQ written.
template <typename T, typename Unit>
ELLE_TARGET void BackwardBlock(const Attention& work, int64_t sample, int64_t head, int64_t number,
                               const BackwardBuffers<Unit>& buffers) {
    constexpr int64_t kUnit = Unit::kUnit;
    const int64_t wide = RoundUp(work.dim), units = wide / kUnit, first = number * kBlockQueries;
    const Queries queries(work, sample, head, number);
    PackBoth<T, Unit>(RowOf<T>(work.q, sample, head, first), work.q.row, queries.count(), kBlockQueries,
                      work.dim, buffers.q, buffers.q_interleaved);
    Transpose(buffers.q, units, buffers.q_transposed);
    PackBoth<T, Unit>(RowOf<T>(work.grad, sample, head, first), work.grad.row, queries.count(), kBlockQueries,
                      work.dim, buffers.grad, buffers.grad_interleaved);
    Transpose(buffers.grad, units, buffers.grad_transposed);
    Statistics statistics;
    ReadStatistics<T>(work, sample, head, first, queries.count(), statistics);
    std::memset(buffers.dq, 0, wide * kBlockQueries * sizeof(float));
    KeyBlock block;
    for (int64_t place = 0; queries.Next(place, block);) {
        const int64_t lane = block.first * kGroup, groups = block.end - block.first;
        Gemm<Unit>(block.count, groups, units, {buffers.k + block.begin * units, units, 1},
                   {buffers.q_transposed + lane, kBlockQueries}, {buffers.scores + lane, kBlockQueries},
                   Into::kNothing);
        Gemm<Unit>(block.count, groups, units, {buffers.v + block.begin * units, units, 1},
                   {buffers.grad_transposed + lane, kBlockQueries}, {buffers.products + lane, kBlockQueries},
                   Into::kNothing);
        AnyBlockGradients<Unit>(work, queries, block, statistics, buffers);
        const int64_t summed = groups * kGroup / kUnit, columns = wide / kGroup;
        Gemm<Unit>(block.count, columns, summed, {buffers.weights + lane / kUnit, kBlockQueries / kUnit, 1},
                   {buffers.grad_interleaved + lane / kUnit * wide, wide},
                   {buffers.dv + block.begin * wide, wide}, Into::kAdd);
        Gemm<Unit>(block.count, columns, summed, {buffers.d_scores + lane / kUnit, kBlockQueries / kUnit, 1},
                   {buffers.q_interleaved + lane / kUnit * wide, wide},
                   {buffers.dk + block.begin * wide, wide}, Into::kAdd);
        Gemm<Unit>(wide, groups, block.count / kUnit,
                   {buffers.k_interleaved + block.begin / kUnit * wide, 1, wide},
                   {buffers.d_scores_interleaved + lane, kBlockQueries}, {buffers.dq + lane, kBlockQueries},
                   Into::kAdd);
    }
    float factors[kBlockQueries];
    for (int64_t i = 0; i < kBlockQueries; ++i) factors[i] = work.scale;
    StoreColumns<T>(buffers.dq, factors, queries.count(), work.dim, work.dq, sample, head, first,
                    buffers.rows);
}

template <typename T>
ELLE_INLINE void StoreKeys(float* sums, float factor, const Attention& work, const OutRows& out,
                           int64_t sample, int64_t group) {
    const int64_t wide = RoundUp(work.dim);
    T* to = static_cast<T*>(out.data) + sample * out.batch + out.heads[group];
    for (int64_t j = 0; j < work.keys; ++j) {
        float* row = sums + j * wide;
        for (int64_t d = 0; d < wide; d += kWidth) Store(row + d, Load(row + d) * factor);
        StoreRow(row, to + j * out.row, work.dim);
    }
}

template <typename T, typename Unit>
ELLE_TARGET void Backward(const Attention& work, int64_t sample, int64_t group, float* scratch) {
    const BackwardBuffers<Unit> buffers(work, scratch);
    const int64_t wide = RoundUp(work.dim), padded = PaddedKeys(work);
    PackBoth<T, Unit>(RowOf<T>(work.k, sample, group, 0), work.k.row, work.keys, padded, work.dim, buffers.k,
                      buffers.k_interleaved);
    PackNatural(RowOf<T>(work.v, sample, group, 0), work.v.row, work.keys, padded, work.dim,
                reinterpret_cast<typename Unit::Element*>(buffers.v));
    std::memset(buffers.dk, 0, padded * wide * sizeof(float));
    std::memset(buffers.dv, 0, padded * wide * sizeof(float));
    for (int64_t head = 0; head < work.heads; ++head) {
        if (work.kv_of[head] != group) continue;
        for (int64_t number = 0; number < work.blocks(); ++number)
            BackwardBlock<T, Unit>(work, sample, head, number, buffers);
    }
    StoreKeys<T>(buffers.dk, work.scale, work, work.dk, sample, group);
    StoreKeys<T>(buffers.dv, work.keep_scale, work, work.dv, sample, group);
}

template <typename Unit>
ELLE_TARGET int64_t BackwardSize(const Attention& work) {
    return BackwardBuffers<Unit>(work, nullptr).floats;
}

template <typename T, typename Unit>
AttentionKernels MakeKernels() {
    return {PackedSize<Unit>,      PackKeys<T, Unit>,  ForwardSize<Unit>,
            ForwardBlock<T, Unit>, BackwardSize<Unit>, Backward<T, Unit>};
}

}  // namespace ELLE_LEVEL
}  // namespace elle_mp
