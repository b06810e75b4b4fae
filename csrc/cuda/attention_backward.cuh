// Attention, backward: scores and masks are computed again, tile by tile, from the log-sum-exp of each query.
//
// With P the weights, M the mask with its scale, D = dO V^T and delta = sum(dO O) - dlse for each query:
// dV = (M P)^T dO, dS = P (M D - delta), dQ = scale dS K, dK = scale dS^T Q. One kernel makes dQ, another dK
// and dV; each block writes what is its own, in a fixed order, so results are bitwise repeatable.
#pragma once

#include "attention.cuh"

namespace elle_mp {

// delta of each query: a warp for each.
template <typename T>
ELLE_KERNEL(kAttentionThreads)
Deltas(Attention work) {
    const int query = BlockX() * (kAttentionThreads / kWarp) + ThreadIndex() / kWarp;
    const int head = BlockY(), sample = BlockZ(), lane = ThreadIndex() % kWarp;
    if (query >= work.queries) return;
    const T* out = work.out.Start<const T>(sample, head) + query * work.out.row;
    const T* grad = work.grad.Start<const T>(sample, head) + query * work.grad.row;
    float sum = 0.0f;
    for (int d = lane; d < work.dim; d += kWarp) sum += ToFloat(out[d]) * ToFloat(grad[d]);
    sum = WarpSum(sum);
    const int64_t at = work.Row(sample, head, query);
    if (lane == 0) work.delta[at] = work.grad_lse ? sum - work.grad_lse[at] : sum;
}

template <typename T, int kDim>
constexpr int64_t QueriesShared() {
    // Queries and their gradient, and two stages of keys and values.
    return 6 * kTile * kDim * static_cast<int64_t>(sizeof(T));
}

// dQ of one tile of queries of one head.
template <typename T, int kDim, bool kDrop>
ELLE_KERNEL(kAttentionThreads)
QueryGradients(Attention work) {
    const int number = BlocksX() - 1 - BlockX(), head = BlockY(), sample = BlockZ();
    const int first = number * kTile, row = ThreadIndex() / kWarp * 16, lane = ThreadIndex() % kWarp;
    const int tiles = TilesOf(work.keys), kv = work.kv_of[head];
    T* q = reinterpret_cast<T*>(SharedMemory());
    T* grad = q + kTile * kDim;
    T* stages = grad + kTile * kDim;
    const T* keys = work.k.Start<const T>(sample, kv);
    const T* values = work.v.Start<const T>(sample, kv);
    const Summary summary = work.summaries[sample * BlocksX() + number];
    const auto load = [&](int tile, int stage) {
        T* to = stages + stage * 2 * kTile * kDim;
        const int64_t begin = static_cast<int64_t>(tile) * kTile;
        LoadTile<T, kDim, kTile>(to, keys + begin * work.k.row, work.k, work.keys - tile * kTile, work.dim);
        LoadTile<T, kDim, kTile>(to + kTile * kDim, values + begin * work.v.row, work.v,
                                 work.keys - tile * kTile, work.dim);
    };
    LoadTile<T, kDim, kTile>(q, work.q.Start<const T>(sample, head) + first * work.q.row, work.q,
                             work.queries - first, work.dim);
    LoadTile<T, kDim, kTile>(grad, work.grad.Start<const T>(sample, head) + first * work.grad.row, work.grad,
                             work.queries - first, work.dim);
    int tile = NextTile(summary, 0, tiles);
    if (tile < tiles) load(tile, 0);
    CommitCopies();

    Seen seen[2];
    MaskKey mask[2] = {};
    float lse[2], delta[2];
    ELLE_UNROLL
    for (int half = 0; half < 2; ++half) {
        const int query = first + row + lane / 4 + 8 * half;
        const bool here = query < work.queries;
        seen[half] = SeenBy(work, sample, query);
        lse[half] = here ? LogSumOf(work, work.Row(sample, head, query)) : INFINITY;
        delta[half] = here ? work.delta[work.Row(sample, head, query)] : 0.0f;
        if (kDrop && here) mask[half] = QueryKey(work, sample, head, query);
    }
    const float scale = work.scale * kLog2E;
    float dq[1][kDim / 8][4];
    Clear(dq);
    for (int stage = 0; tile < tiles; stage ^= 1) {
        const int next = NextTile(summary, tile + 1, tiles);
        if (next < tiles) load(next, stage ^ 1);
        CommitCopies();
        WaitCopies<1>();
        SyncThreads();
        const T* k = stages + stage * 2 * kTile * kDim;
        float scores[1][kTile / 8][4], products[1][kTile / 8][4];
        Clear(scores);
        Clear(products);
        MultiplyRows<T, kDim, kTile, 1>(scores, q, row, k);
        MultiplyRows<T, kDim, kTile, 1>(products, grad, row, k + kTile * kDim);
        const bool masked = !SeesAll(summary, tile * kTile);
        ELLE_UNROLL
        for (int n = 0; n < kTile / 8; ++n) {
            const int column = tile * kTile + n * 8 + lane % 4 * 2;
            ELLE_UNROLL
            for (int half = 0; half < 2; ++half) {
                uint32_t word = 0;
                if (kDrop) word = MaskWord(mask[half], static_cast<uint32_t>(column) / 2);
                ELLE_UNROLL
                for (int e = 0; e < 2; ++e) {
                    float weight = Exp2(scores[0][n][2 * half + e] * scale - lse[half]);
                    if (masked && !seen[half](column + e)) weight = 0.0f;
                    float product = products[0][n][2 * half + e];
                    if (kDrop) product = Kept(word, e, work.threshold) ? product * work.keep_scale : 0.0f;
                    scores[0][n][2 * half + e] = weight * (product - delta[half]);
                }
            }
        }
        MultiplyResult<T, kDim, kTile, 1>(dq, scores, k);
        SyncThreads();
        tile = next;
    }
    WaitCopies<0>();
    const float factor[2] = {work.scale, work.scale};
    StoreRows<T, kDim>(dq[0], factor, work.dq.Start<T>(sample, head), work.dq.row, first + row, work.queries,
                       work.dim);
}

// Queries of one step of the kernel below: as many as registers allow.
template <int kDim>
constexpr int kStepOf = kDim > 64 ? 32 : 64;

// What it must know of each query of a step.
template <int kStep>
struct QueryFacts {
    float lse[kStep], delta[kStep];
    Seen seen[kStep];
    MaskKey mask[kStep];
};

template <typename T, int kDim>
constexpr int64_t KeysShared() {
    // Keys and values, and two stages of queries, their gradients and what is known of them.
    return (2 * kTile + 4 * kStepOf<kDim>)*kDim * static_cast<int64_t>(sizeof(T)) +
           2 * static_cast<int64_t>(sizeof(QueryFacts<kStepOf<kDim>>));
}

// The steps of queries that see a tile of keys, head after head of those that read its kv head.
class Steps {
  public:
    int head = -1, first = 0;  // of the step

    ELLE_METHOD Steps(const Attention& work, int sample, int kv, int begin, int step)
        : work_(work), sample_(sample), kv_(kv), begin_(begin), step_(step) {
        first = work.queries;
        Advance();
    }
    ELLE_METHOD bool left() const { return head < work_.heads; }
    ELLE_METHOD const Summary& summary() const {
        return work_.summaries[sample_ * TilesOf(work_.queries) + first / kTile];
    }
    ELLE_METHOD void Advance() {
        first += step_;
        for (;;) {
            for (; first < work_.queries; first += step_)
                if (head >= 0 && SeesAny(summary(), begin_)) return;
            do ++head;
            while (head < work_.heads && work_.kv_of[head] != kv_);
            if (head >= work_.heads) return;
            first = 0;
        }
    }

  private:
    const Attention& work_;
    int sample_, kv_, begin_, step_;
};

template <int kStep, bool kDrop>
ELLE_DEVICE void LoadFacts(const Attention& work, int sample, const Steps& at, QueryFacts<kStep>& to) {
    const int i = ThreadIndex(), query = at.first + i;
    if (i >= kStep) return;
    const bool here = query < work.queries;
    to.lse[i] = here ? LogSumOf(work, work.Row(sample, at.head, query)) : INFINITY;
    to.delta[i] = here ? work.delta[work.Row(sample, at.head, query)] : 0.0f;
    to.seen[i] = SeenBy(work, sample, query);
    if (kDrop) to.mask[i] = here ? QueryKey(work, sample, at.head, query) : MaskKey{};
}

// Scores and products [16 keys, kStep queries] become dropped weights and gradients of scores.
template <int kStep, bool kDrop>
ELLE_DEVICE void KeyStep(const Attention& work, const QueryFacts<kStep>& facts, bool masked, int key,
                         float (&scores)[kStep / 8][4], float (&products)[kStep / 8][4]) {
    const float scale = work.scale * kLog2E;
    const int lane = ThreadIndex() % kWarp;
    ELLE_UNROLL
    for (int n = 0; n < kStep / 8; ++n) {
        const int query = n * 8 + lane % 4 * 2;
        ELLE_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int own = key + 8 * half;
            uint32_t words[2] = {};
            if (kDrop) {
                // A word is for an even key and the odd one behind it, which the lane 4 further has: each of
                // the two makes the word of one query.
                const bool odd = own & 1;
                const uint32_t mine =
                    MaskWord(facts.mask[query + (odd ? 1 : 0)], static_cast<uint32_t>(own) / 2);
                const uint32_t other = ShuffleXor(mine, 4);
                words[0] = odd ? other : mine;
                words[1] = odd ? mine : other;
            }
            ELLE_UNROLL
            for (int e = 0; e < 2; ++e) {
                float& score = scores[n][2 * half + e];
                float& product = products[n][2 * half + e];
                float weight = Exp2(score * scale - facts.lse[query + e]);
                if (masked && !facts.seen[query + e](own)) weight = 0.0f;
                const bool kept = !kDrop || Kept(words[e], own, work.threshold);
                if (kDrop) product = kept ? product * work.keep_scale : 0.0f;
                product = weight * (product - facts.delta[query + e]);
                score = kept ? weight : 0.0f;
            }
        }
    }
}

// dK and dV of one tile of keys of one kv head.
template <typename T, int kDim, bool kDrop>
ELLE_KERNEL(kAttentionThreads)
KeyGradients(Attention work) {
    constexpr int kStep = kStepOf<kDim>;
    typedef QueryFacts<kStep> Facts;
    const int begin = BlockX() * kTile, kv = BlockY(), sample = BlockZ();
    const int row = ThreadIndex() / kWarp * 16, lane = ThreadIndex() % kWarp;
    T* k = reinterpret_cast<T*>(SharedMemory());
    T* v = k + kTile * kDim;
    T* stages = v + kTile * kDim;
    Facts* facts = reinterpret_cast<Facts*>(stages + 4 * kStep * kDim);
    const auto load = [&](const Steps& at, int stage) {
        T* to = stages + stage * 2 * kStep * kDim;
        LoadTile<T, kDim, kStep>(to, work.q.Start<const T>(sample, at.head) + at.first * work.q.row, work.q,
                                 work.queries - at.first, work.dim);
        LoadTile<T, kDim, kStep>(to + kStep * kDim,
                                 work.grad.Start<const T>(sample, at.head) + at.first * work.grad.row,
                                 work.grad, work.queries - at.first, work.dim);
        LoadFacts<kStep, kDrop>(work, sample, at, facts[stage]);
    };
    const int64_t here = begin;
    LoadTile<T, kDim, kTile>(k, work.k.Start<const T>(sample, kv) + here * work.k.row, work.k,
                             work.keys - begin, work.dim);
    LoadTile<T, kDim, kTile>(v, work.v.Start<const T>(sample, kv) + here * work.v.row, work.v,
                             work.keys - begin, work.dim);
    Steps at(work, sample, kv, begin, kStep);
    if (at.left()) load(at, 0);
    CommitCopies();

    float dk[1][kDim / 8][4], dv[1][kDim / 8][4];
    Clear(dk);
    Clear(dv);
    for (int stage = 0; at.left(); stage ^= 1) {
        const bool masked = !SeesAll(at.summary(), begin);
        at.Advance();
        if (at.left()) load(at, stage ^ 1);
        CommitCopies();
        WaitCopies<1>();
        SyncThreads();
        const T* q = stages + stage * 2 * kStep * kDim;
        const T* grad = q + kStep * kDim;
        float scores[1][kStep / 8][4], products[1][kStep / 8][4];
        Clear(scores);
        Clear(products);
        MultiplyRows<T, kDim, kStep, 1>(scores, k, row, q);
        MultiplyRows<T, kDim, kStep, 1>(products, v, row, grad);
        KeyStep<kStep, kDrop>(work, facts[stage], masked, begin + row + lane / 4, scores[0], products[0]);
        MultiplyResult<T, kDim, kStep, 1>(dv, scores, grad);
        MultiplyResult<T, kDim, kStep, 1>(dk, products, q);
        SyncThreads();
    }
    WaitCopies<0>();
    const float key_factor[2] = {work.scale, work.scale},
                value_factor[2] = {work.keep_scale, work.keep_scale};
    StoreRows<T, kDim>(dk[0], key_factor, work.dk.Start<T>(sample, kv), work.dk.row, begin + row, work.keys,
                       work.dim);
    StoreRows<T, kDim>(dv[0], value_factor, work.dv.Start<T>(sample, kv), work.dv.row, begin + row, work.keys,
                       work.dim);
}

}  // namespace elle_mp
