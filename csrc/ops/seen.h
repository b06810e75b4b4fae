// Which keys the queries of a block see, and the dropout masks of their rows.
#pragma once

#include "masks.h"

namespace elle_mp {
namespace ELLE_LEVEL {

// Keys of one block at most.
constexpr int64_t kBlockKeys = 64;

// Some keys, and those groups of 16 queries that see any of them.
struct KeyBlock {
    int64_t begin, count;  // begin is even, count a multiple of 16
    int64_t first, end;    // groups of queries
    bool masked;           // not every query sees every key
};

// The queries of one block, one to a lane; the lanes behind the last query see nothing.
class Queries {
  public:
    ELLE_INLINE Queries(const Attention& work, int64_t sample, int64_t head, int64_t block)
        : work_(work), threshold_(static_cast<int32_t>(work.threshold)) {
        const int64_t first = block * kBlockQueries;
        count_ = work.queries - first < kBlockQueries ? work.queries - first : kBlockQueries;
        const int32_t* seen = work.seen + (sample * work.queries + first) * 3;
        const int32_t keys = static_cast<int32_t>(work.keys);
        for (int64_t i = 0; i < kBlockQueries; ++i) {
            const bool here = i < count_;
            prefix_[i] = here ? Clamp(seen[3 * i], keys) : 0;
            begin_[i] = here ? Clamp(seen[3 * i + 1], keys) : 0;
            end_[i] = here ? Clamp(seen[3 * i + 2], keys) : 0;
        }
        for (int64_t g = 0; g < kBlockQueries / kGroup; ++g) Summarise(g);
        if (work.threshold == 0) return;
        for (int64_t i = 0; i < count_; ++i) {
            const int64_t row = (work.first_head + head) * work.keys + work.positions[first + i];
            const uint64_t key = Mix64(static_cast<uint64_t>(work.sample_keys[sample]) +
                                       static_cast<uint64_t>(row + 1) * kGolden);
            low_[i] = static_cast<uint32_t>(key);
            high_[i] = static_cast<uint32_t>(key >> 32);
        }
    }

    ELLE_INLINE int64_t count() const { return count_; }

    // The next block of keys, from `place` on, which starts at 0 and is moved behind it; false at the end.
    ELLE_INLINE bool Next(int64_t& place, KeyBlock& block) const {
        block.count = 0;
        for (;;) {
            // Behind the prefixes come the intervals; blocks begin at even keys.
            if (place >= prefix_end_ && place < (interval_begin_ & ~int64_t{1}))
                place = interval_begin_ & ~int64_t{1};
            if (place >= prefix_end_ && place >= interval_end_) break;
            KeyBlock chunk{place, kGroup, kBlockQueries / kGroup, 0, false};
            Look(chunk);
            if (chunk.first >= chunk.end) {
                if (block.count > 0) break;
                place += kGroup;
                continue;
            }
            if (block.count == 0) {
                block = chunk;
            } else {
                const bool joins = block.begin + block.count == place && block.first == chunk.first &&
                                   block.end == chunk.end && block.count < kBlockKeys;
                if (!joins) break;
                block.count += kGroup;
                block.masked |= chunk.masked;
            }
            place += kGroup;
        }
        return block.count > 0;
    }

    // All ones in the lanes that see key `key`; `lane` is a multiple of the width.
    ELLE_INLINE Int Sees(int64_t lane, int64_t key) const {
        const Int column = Int{} + static_cast<int32_t>(key);
        return (column < LoadInt(prefix_ + lane)) |
               ((column >= LoadInt(begin_ + lane)) & (column < LoadInt(end_ + lane)));
    }

    // Which weights of keys `key` (even) and key + 1 are kept.
    ELLE_INLINE void Keep(int64_t lane, int64_t key, Int& even, Int& odd) const {
        const Bits word =
            MaskWords(LoadAs<Bits>(low_ + lane) + static_cast<uint32_t>(key / 2), LoadAs<Bits>(high_ + lane));
        even = (Int)(word & 0xffffu) >= threshold_;
        odd = (Int)(word >> 16) >= threshold_;
    }

  private:
    // Of one group: the least and the largest of what its queries see.
    struct Group {
        int32_t prefix_least, prefix_most, begin_least, begin_most, end_least, end_most;
    };

    static ELLE_INLINE int32_t Clamp(int32_t x, int32_t most) { return x < 0 ? 0 : x > most ? most : x; }
    static ELLE_INLINE int32_t Least(int32_t a, int32_t b) { return a < b ? a : b; }
    static ELLE_INLINE int32_t Most(int32_t a, int32_t b) { return a > b ? a : b; }

    ELLE_INLINE void Summarise(int64_t g) {
        const int32_t beyond = static_cast<int32_t>(work_.keys);
        Group x{beyond, 0, beyond, 0, beyond, 0};
        for (int64_t i = g * kGroup; i < (g + 1) * kGroup; ++i) {
            const bool empty = begin_[i] >= end_[i];
            x.prefix_least = Least(x.prefix_least, prefix_[i]);
            x.prefix_most = Most(x.prefix_most, prefix_[i]);
            // An empty interval reaches nowhere, and the group does not see a key as one.
            x.begin_least = Least(x.begin_least, empty ? beyond : begin_[i]);
            x.begin_most = Most(x.begin_most, empty ? beyond : begin_[i]);
            x.end_least = Least(x.end_least, empty ? 0 : end_[i]);
            x.end_most = Most(x.end_most, empty ? 0 : end_[i]);
        }
        groups_[g] = x;
        prefix_end_ = g == 0 ? x.prefix_most : Most(prefix_end_, x.prefix_most);
        interval_begin_ = g == 0 ? x.begin_least : Least(interval_begin_, x.begin_least);
        interval_end_ = g == 0 ? x.end_most : Most(interval_end_, x.end_most);
    }

    ELLE_INLINE void Look(KeyBlock& chunk) const {
        const int64_t begin = chunk.begin, end = chunk.begin + kGroup;
        int64_t whole = 0;
        for (int64_t g = 0; g < kBlockQueries / kGroup; ++g) {
            const Group& x = groups_[g];
            if (begin >= x.prefix_most && (begin >= x.end_most || end <= x.begin_least)) continue;
            if (g < chunk.first) chunk.first = g;
            chunk.end = g + 1;
            whole += end <= x.prefix_least || (x.begin_most <= begin && end <= x.end_least);
        }
        chunk.masked = whole < chunk.end - chunk.first;
    }

    const Attention& work_;
    int32_t threshold_;
    int64_t count_;
    int32_t prefix_end_, interval_begin_, interval_end_;
    Group groups_[kBlockQueries / kGroup];
    int32_t prefix_[kBlockQueries], begin_[kBlockQueries], end_[kBlockQueries];
    uint32_t low_[kBlockQueries] = {}, high_[kBlockQueries] = {};
};

}  // namespace ELLE_LEVEL
}  // namespace elle_mp
