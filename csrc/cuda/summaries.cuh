// Summaries of what each tile of queries sees, which the kernels of both directions skip tiles by.
#pragma once

#include "attention.cuh"

namespace elle_mp {

// A warp for each tile.
ELLE_KERNEL(kAttentionThreads)
Summarise(Attention work) {
    const int tiles = TilesOf(work.queries), warps = kAttentionThreads / kWarp;
    const int64_t at = static_cast<int64_t>(BlockX()) * warps + ThreadIndex() / kWarp;
    if (at >= static_cast<int64_t>(work.batch) * tiles) return;
    const int sample = static_cast<int>(at / tiles), first = static_cast<int>(at % tiles) * kTile;
    const int lane = ThreadIndex() % kWarp, beyond = work.keys;
    Summary x{beyond, 0, beyond, 0, beyond, 0};
    for (int query = first + lane; query < first + kTile && query < work.queries; query += kWarp) {
        const Seen seen = SeenBy(work, sample, query);
        const bool empty = seen.begin >= seen.end;
        const int begin = empty ? beyond : seen.begin, end = empty ? 0 : seen.end;
        x = {Smaller(x.prefix_least, seen.prefix),
             Bigger(x.prefix_most, seen.prefix),
             Smaller(x.begin_least, begin),
             Bigger(x.begin_most, begin),
             Smaller(x.end_least, end),
             Bigger(x.end_most, end)};
    }
    x = {-WarpMax(-x.prefix_least), WarpMax(x.prefix_most), -WarpMax(-x.begin_least),
         WarpMax(x.begin_most),     -WarpMax(-x.end_least), WarpMax(x.end_most)};
    if (lane == 0) work.summaries[at] = x;
}

inline const char* RunSummarise(const Attention& work, void* stream) {
    const int64_t tiles = static_cast<int64_t>(work.batch) * TilesOf(work.queries);
    constexpr int kWarps = kAttentionThreads / kWarp;
    return Launch(Summarise, {(tiles + kWarps - 1) / kWarps, 1, 1}, kAttentionThreads, 0, stream, work);
}

}  // namespace elle_mp
