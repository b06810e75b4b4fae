// Attention, forward: an online softmax over blocks of keys (FlashAttention, arXiv 2205.14135).
//
// Queries are lanes: the scores of a block are S^T [keys, queries], so that maxima, sums and rescaling go
// lane by lane, and weights become the right operand of mixed^T [dim, queries] = V^T P^T where they lie.
#pragma once

#include "pack.h"
#include "seen.h"

namespace elle_mp {
namespace ELLE_LEVEL {

// Rows of packed keys: a block may reach 15 past the last one.
ELLE_INLINE int64_t PaddedKeys(const Attention& work) { return RoundUp(work.keys) + kGroup; }

// Hands out pieces of a buffer, each aligned to 64 bytes.
class Pieces {
  public:
    ELLE_INLINE explicit Pieces(float* buffer) : start_(buffer), next_(buffer) {}
    ELLE_INLINE float* Take(int64_t floats) {
        float* piece = next_;
        next_ += RoundUp(floats);
        return piece;
    }
    ELLE_INLINE int64_t taken() const { return next_ - start_; }

  private:
    float* start_;
    float* next_;
};

template <typename Unit>
struct PackedKeys {
    float* k;  // natural
    float* v;  // interleaved
    int64_t floats;

    ELLE_INLINE PackedKeys(const Attention& work, float* buffer) {
        Pieces pieces(buffer);
        const int64_t size = PaddedKeys(work) * RoundUp(work.dim) / Unit::kUnit;
        k = pieces.Take(size);
        v = pieces.Take(size);
        floats = pieces.taken();
    }
};

template <typename Unit>
struct ForwardBuffers {
    float* natural;     // queries [64, dim]
    float* transposed;  // the same, as units [dim, 64]
    float* scores;      // [keys of a block, 64], then weights as units
    float* mixed;       // [dim, 64]
    float* rows;        // [16, dim]
    int64_t floats;

    ELLE_INLINE ForwardBuffers(const Attention& work, float* buffer) {
        Pieces pieces(buffer);
        const int64_t wide = RoundUp(work.dim);
        natural = pieces.Take(kBlockQueries * wide / Unit::kUnit + kGroup);
        transposed = pieces.Take(RoundUp(wide / Unit::kUnit) * kBlockQueries);
        scores = pieces.Take(kBlockKeys * kBlockQueries);
        mixed = pieces.Take(wide * kBlockQueries);
        rows = pieces.Take(kGroup * wide);
        floats = pieces.taken();
    }
};

// Running softmax statistics of 64 queries; the exponents are of 2.
struct Running {
    float top[kBlockQueries], sum[kBlockQueries], factor[kBlockQueries];
};

// Scores of a block become weights, relative to the largest score so far; `factor` is what older sums shrink
// by.
template <typename Unit, bool kMasked, bool kDrop>
ELLE_INLINE void BlockWeights(const Attention& work, const Queries& queries, const KeyBlock& block,
                              float* scores, Running& running) {
    const Vec scale = Fill(work.scale * kLog2E);
    for (int64_t lane = block.first * kGroup; lane < block.end * kGroup; lane += kWidth) {
        float* column = scores + lane;
        Vec tops[4] = {Fill(kLowest), Fill(kLowest), Fill(kLowest), Fill(kLowest)};
        for (int64_t j = 0; j < block.count; j += 4)
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                Vec x = Load(column + (j + i) * kBlockQueries);
                if (kMasked) {
                    x = Choose(queries.Sees(lane, block.begin + j + i), x, Fill(kLowest));
                    Store(column + (j + i) * kBlockQueries, x);
                }
                tops[i] = Max(tops[i], x);
            }
        const Vec before = Load(running.top + lane);
        const Vec now = Max(before, Max(Max(tops[0], tops[1]), Max(tops[2], tops[3])) * scale);
        const Vec shift = Choose(now == kLowest, Fill(0.0f), now);
        const Vec factor = Exp2<true>(before - shift);
        Vec even_sum = Fill(0.0f), odd_sum = even_sum;
        for (int64_t j = 0; j < block.count; j += 2) {
            float* at = column + j * kBlockQueries;
            Vec even = Exp2<Unit::kPrecise>(Load(at) * scale - shift);
            Vec odd = Exp2<Unit::kPrecise>(Load(at + kBlockQueries) * scale - shift);
            even_sum += even;
            odd_sum += odd;
            if (kDrop) {
                Int keep_even, keep_odd;
                queries.Keep(lane, block.begin + j, keep_even, keep_odd);
                even = (Vec)((Int)even & keep_even);
                odd = (Vec)((Int)odd & keep_odd);
            }
            if constexpr (Unit::kUnit == 2) {
                Unit::StoreInterleaved(column + j / 2 * kBlockQueries, even, odd);
            } else {
                Store(at, even);
                Store(at + kBlockQueries, odd);
            }
        }
        Store(running.top + lane, now);
        Store(running.factor + lane, factor);
        Store(running.sum + lane, Load(running.sum + lane) * factor + (even_sum + odd_sum));
    }
}

template <typename Unit>
ELLE_NOINLINE void AnyBlockWeights(const Attention& work, const Queries& queries, const KeyBlock& block,
                                   float* scores, Running& running) {
    const bool drop = work.threshold > 0;
    if (block.masked && drop)
        BlockWeights<Unit, true, true>(work, queries, block, scores, running);
    else if (block.masked)
        BlockWeights<Unit, true, false>(work, queries, block, scores, running);
    else if (drop)
        BlockWeights<Unit, false, true>(work, queries, block, scores, running);
    else
        BlockWeights<Unit, false, false>(work, queries, block, scores, running);
}

template <typename T, typename Unit>
ELLE_TARGET void ForwardBlock(const Attention& work, int64_t sample, int64_t head, int64_t number,
                              const float* packed, float* scratch) {
    const int64_t wide = RoundUp(work.dim), units = wide / Unit::kUnit;
    const PackedKeys<Unit> keys(work, const_cast<float*>(packed));
    const ForwardBuffers<Unit> buffers(work, scratch);
    const Queries queries(work, sample, head, number);
    const int64_t first = number * kBlockQueries;
    PackNatural(RowOf<T>(work.q, sample, head, first), work.q.row, queries.count(), kBlockQueries, work.dim,
                reinterpret_cast<typename Unit::Element*>(buffers.natural));
    Transpose(buffers.natural, units, buffers.transposed);
    std::memset(buffers.mixed, 0, wide * kBlockQueries * sizeof(float));
    Running running;
    for (int64_t i = 0; i < kBlockQueries; ++i) {
        running.top[i] = kLowest;
        running.sum[i] = 0.0f;
    }
    KeyBlock block;
    for (int64_t place = 0; queries.Next(place, block);) {
        const int64_t lane = block.first * kGroup, groups = block.end - block.first;
        Gemm<Unit>(block.count, groups, units, {keys.k + block.begin * units, units, 1},
                   {buffers.transposed + lane, kBlockQueries}, {buffers.scores + lane, kBlockQueries},
                   Into::kNothing);
        AnyBlockWeights<Unit>(work, queries, block, buffers.scores, running);
        Gemm<Unit>(wide, groups, block.count / Unit::kUnit,
                   {keys.v + block.begin / Unit::kUnit * wide, 1, wide},
                   {buffers.scores + lane, kBlockQueries}, {buffers.mixed + lane, kBlockQueries},
                   Into::kScaledAdd, running.factor + lane);
    }
    float* lse = work.lse + (sample * work.heads + head) * work.queries + first;
    for (int64_t i = 0; i < queries.count(); ++i)
        lse[i] = running.sum[i] == 0.0f ? kLowest : running.top[i] * kLn2 + __builtin_logf(running.sum[i]);
    for (int64_t i = 0; i < kBlockQueries; ++i)
        running.factor[i] = running.sum[i] == 0.0f ? 0.0f : work.keep_scale / running.sum[i];
    StoreColumns<T>(buffers.mixed, running.factor, queries.count(), work.dim, work.out, sample, head, first,
                    buffers.rows);
}

template <typename T, typename Unit>
ELLE_TARGET void PackKeys(const Attention& work, int64_t sample, int64_t group, float* to) {
    typedef typename Unit::Element E;
    const PackedKeys<Unit> keys(work, to);
    const int64_t padded = PaddedKeys(work);
    const T* value = RowOf<T>(work.v, sample, group, 0);
    if constexpr (Unit::kUnit == 2) {
        // The keys' place serves the values first.
        PackNatural(value, work.v.row, work.keys, padded, work.dim, reinterpret_cast<E*>(keys.k));
        Interleave(reinterpret_cast<E*>(keys.k), padded, RoundUp(work.dim), keys.v);
    } else {
        PackNatural(value, work.v.row, work.keys, padded, work.dim, reinterpret_cast<E*>(keys.v));
    }
    PackNatural(RowOf<T>(work.k, sample, group, 0), work.k.row, work.keys, padded, work.dim,
                reinterpret_cast<E*>(keys.k));
}

template <typename Unit>
ELLE_TARGET int64_t PackedSize(const Attention& work) {
    return PackedKeys<Unit>(work, nullptr).floats;
}

template <typename Unit>
ELLE_TARGET int64_t ForwardSize(const Attention& work) {
    return ForwardBuffers<Unit>(work, nullptr).floats;
}

}  // namespace ELLE_LEVEL
}  // namespace elle_mp
