// What a call of attention is about; its host side describes it, its kernels read it.
#pragma once

#include <cstdint>

#include "target.h"

namespace elle_mp {

// Queries or keys of one tile; a warp takes 16 of them.
constexpr int kTile = 64;
constexpr int kMostHeads = 1024;
// Rows [batch, row, head, dim] with unit stride in dim; strides in elements. Heads come in groups.
struct HeadRows {
    void* data;
    int64_t batch, row, group, head;
    int heads_in_group;
    bool aligned;  // every row starts at a multiple of 16 bytes, and dim is a multiple of 8 elements

    template <typename T>
    ELLE_METHOD T* Start(int sample, int h) const {
        return static_cast<T*>(data) + sample * batch + h / heads_in_group * group +
               h % heads_in_group * head;
    }
};

// Of one tile of queries: the least and the largest of what they see (seen below). An empty interval begins
// behind all keys and ends before them.
struct Summary {
    int prefix_least, prefix_most, begin_least, begin_most, end_least, end_most;
};

struct Attention {
    int batch, queries, keys, heads, groups, dim;
    HeadRows q, k, v;
    // [batch, queries, 3]: a query sees keys [0, x[0]) and [x[1], x[2]).
    const int32_t* seen;
    Summary* summaries;  // [batch, query tiles]
    float scale;
    uint32_t threshold;  // of dropout; no mask where it is 0
    float keep_scale;
    const int64_t* sample_keys;
    const int64_t* positions;  // [queries]: row of the mask within a head
    int64_t first_head;
    float* lse;    // [batch, heads, queries], natural logarithm; -inf where a query sees nothing
    HeadRows out;  // forward: written; backward: read

    // Backward.
    HeadRows grad;
    const float* grad_lse;  // as lse, or null
    float* delta;           // as lse: sum(grad out) - grad_lse of each query
    HeadRows dq, dk, dv;

    // Query head h reads key and value head kv_of[h].
    uint16_t kv_of[kMostHeads];

    ELLE_BOTH int64_t Row(int sample, int head, int query) const {
        return (static_cast<int64_t>(sample) * heads + head) * queries + query;
    }
};

ELLE_BOTH constexpr int TilesOf(int rows) { return (rows + kTile - 1) / kTile; }

// Each starts its kernels on a stream; null, or what went wrong.
const char* RunAttentionForward(const Attention& work, Element type, void* stream);
const char* RunAttentionBackward(const Attention& work, Element type, void* stream);

}  // namespace elle_mp
