// Attention, forward: a running softmax over tiles of keys (FlashAttention-2, arXiv 2307.08691).
#pragma once

#include "attention.cuh"

namespace elle_mp {

// Groups of 16 queries that a warp takes: what is read of a tile of keys serves all of them. Registers allow
// two of narrow heads.
template <int kDim>
constexpr int kGroupsOf = kDim > 64 ? 1 : 2;
template <int kDim>
constexpr int kQueriesOf = kGroupsOf<kDim> * kTile;

template <typename T, int kDim>
constexpr int64_t ForwardShared() {
    // Queries, and two stages of keys and values.
    return (kQueriesOf<kDim> + 4 * kTile) * kDim * static_cast<int64_t>(sizeof(T));
}

// The softmax of a warp's 16 queries as far as their keys have been seen; a lane has two rows.
struct Running {
    float top[2] = {-INFINITY, -INFINITY};  // largest score, not scaled
    float sum[2] = {0.0f, 0.0f};            // of the lane's own columns
};

// Scores [16, kTile] become weights, dropped where they are, and what is summed so far is scaled to them.
template <int kDim, bool kDrop>
ELLE_DEVICE void Weigh(const Attention& work, const Seen (&seen)[2], const MaskKey (&mask)[2], bool masked,
                       int begin, float (&scores)[kTile / 8][4], float (&out)[kDim / 8][4],
                       Running& running) {
    const int column = begin + ThreadIndex() % 4 * 2;
    const float scale = work.scale * kLog2E;
    ELLE_UNROLL
    for (int half = 0; half < 2; ++half) {
        float top = running.top[half];
        ELLE_UNROLL
        for (int n = 0; n < kTile / 8; ++n) {
            ELLE_UNROLL
            for (int e = 0; e < 2; ++e) {
                float& score = scores[n][2 * half + e];
                if (masked && !seen[half](column + n * 8 + e)) score = -INFINITY;
                top = Larger(top, score);
            }
        }
        // Four lanes share a row.
        top = Larger(top, ShuffleXor(top, 1));
        top = Larger(top, ShuffleXor(top, 2));
        // A row that has seen nothing keeps weights of 0.
        const float shift = top == -INFINITY ? 0.0f : top * scale;
        const float factor = Exp2(running.top[half] * scale - shift);
        running.top[half] = top;
        float sum = running.sum[half] * factor;
        ELLE_UNROLL
        for (int n = 0; n < kTile / 8; ++n) {
            uint32_t word = 0;
            if (kDrop) word = MaskWord(mask[half], static_cast<uint32_t>(column + n * 8) / 2);
            ELLE_UNROLL
            for (int e = 0; e < 2; ++e) {
                float& score = scores[n][2 * half + e];
                const float weight = Exp2(score * scale - shift);
                sum += weight;
                score = kDrop && !Kept(word, e, work.threshold) ? 0.0f : weight;
            }
        }
        running.sum[half] = sum;
        ELLE_UNROLL
        for (int n = 0; n < kDim / 8; ++n) {
            out[n][2 * half] *= factor;
            out[n][2 * half + 1] *= factor;
        }
    }
}

// What a block's queries see together.
ELLE_DEVICE Summary SummaryOf(const Attention& work, int sample, int first, int count) {
    const int tiles = TilesOf(work.queries), tile = first / kTile;
    const Summary* summaries = work.summaries + static_cast<int64_t>(sample) * tiles;
    Summary all = summaries[tile];
    for (int i = tile + 1; i < tile + count && i < tiles; ++i) all = Join(all, summaries[i]);
    return all;
}

// Some tiles of queries of one head.
template <typename T, int kDim, bool kDrop>
ELLE_KERNEL(kAttentionThreads)
ForwardTile(Attention work) {
    constexpr int kGroups = kGroupsOf<kDim>, kQueries = kQueriesOf<kDim>;
    // The last queries of a causal sequence see most: they start first.
    const int head = BlockY(), sample = BlockZ(), first = (BlocksX() - 1 - BlockX()) * kQueries;
    const int row = ThreadIndex() / kWarp * 16 * kGroups, lane = ThreadIndex() % kWarp;
    const int tiles = TilesOf(work.keys), kv = work.kv_of[head];
    T* q = reinterpret_cast<T*>(SharedMemory());
    T* stages = q + kQueries * kDim;
    const T* keys = work.k.Start<const T>(sample, kv);
    const T* values = work.v.Start<const T>(sample, kv);
    const Summary summary = SummaryOf(work, sample, first, kGroups);
    const auto load = [&](int tile, int stage) {
        T* to = stages + stage * 2 * kTile * kDim;
        const int64_t begin = static_cast<int64_t>(tile) * kTile;
        LoadTile<T, kDim, kTile>(to, keys + begin * work.k.row, work.k, work.keys - tile * kTile, work.dim);
        LoadTile<T, kDim, kTile>(to + kTile * kDim, values + begin * work.v.row, work.v,
                                 work.keys - tile * kTile, work.dim);
    };
    LoadTile<T, kDim, kQueries>(q, work.q.Start<const T>(sample, head) + first * work.q.row, work.q,
                                work.queries - first, work.dim);
    int tile = NextTile(summary, 0, tiles);
    if (tile < tiles) load(tile, 0);
    CommitCopies();

    Seen seen[kGroups][2];
    MaskKey mask[kGroups][2] = {};
    ELLE_UNROLL
    for (int i = 0; i < 2 * kGroups; ++i) {
        const int query = first + row + lane / 4 + 8 * i;
        seen[i / 2][i % 2] = SeenBy(work, sample, query);
        if (kDrop && query < work.queries) mask[i / 2][i % 2] = QueryKey(work, sample, head, query);
    }
    Running running[kGroups];
    float out[kGroups][kDim / 8][4];
    Clear(out);
    for (int stage = 0; tile < tiles; stage ^= 1) {
        const int next = NextTile(summary, tile + 1, tiles);
        if (next < tiles) load(next, stage ^ 1);
        CommitCopies();
        WaitCopies<1>();
        SyncThreads();
        const T* k = stages + stage * 2 * kTile * kDim;
        const bool masked = !SeesAll(summary, tile * kTile);
        float scores[kGroups][kTile / 8][4];
        Clear(scores);
        MultiplyRows<T, kDim, kTile, kGroups>(scores, q, row, k);
        ELLE_UNROLL
        for (int g = 0; g < kGroups; ++g)
            Weigh<kDim, kDrop>(work, seen[g], mask[g], masked, tile * kTile, scores[g], out[g], running[g]);
        MultiplyResult<T, kDim, kTile, kGroups>(out, scores, k + kTile * kDim);
        SyncThreads();
        tile = next;
    }
    WaitCopies<0>();
    ELLE_UNROLL
    for (int g = 0; g < kGroups; ++g) {
        float factor[2];
        ELLE_UNROLL
        for (int half = 0; half < 2; ++half) {
            float sum = running[g].sum[half];
            sum += ShuffleXor(sum, 1);
            sum += ShuffleXor(sum, 2);
            factor[half] = sum == 0.0f ? 0.0f : work.keep_scale / sum;
            const int query = first + row + 16 * g + lane / 4 + 8 * half;
            if (lane % 4 == 0 && query < work.queries)
                work.lse[work.Row(sample, head, query)] =
                    sum == 0.0f ? -INFINITY : running[g].top[half] * work.scale + Log(sum);
        }
        StoreRows<T, kDim>(out[g], factor, work.out.Start<T>(sample, head), work.out.row,
                           first + row + 16 * g, work.queries, work.dim);
    }
}

}  // namespace elle_mp
