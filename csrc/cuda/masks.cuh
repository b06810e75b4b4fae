// The counter-based bits of dropout masks; elle_mp/ops/dropout.py is the PyTorch twin, equal bit for bit.
#pragma once

#include "device.cuh"

namespace elle_mp {

// SplitMix64's increment and finaliser (Steele, Lea, Flood, OOPSLA 2014), as csrc/helpers/hashing.h.
constexpr uint64_t kMaskGolden = 0x9e3779b97f4a7c15ULL;

ELLE_DEVICE uint64_t MixKey(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
    return x ^ (x >> 31);
}

struct MaskKey {
    uint32_t low, high;
};

// The key of row `row` of a sequence's mask.
ELLE_DEVICE MaskKey RowKey(int64_t sample_key, int64_t row) {
    const uint64_t key =
        MixKey(static_cast<uint64_t>(sample_key) + static_cast<uint64_t>(row + 1) * kMaskGolden);
    return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
}

// The bits of columns 2 pair (low half) and 2 pair + 1: an element is kept where its bits reach the
// threshold.
ELLE_DEVICE uint32_t MaskWord(const MaskKey& key, uint32_t pair) {
    uint32_t word = pair + key.low;
    word = (word ^ (word >> 16)) * 0x21f0aaadu;
    word ^= key.high;
    word = (word ^ (word >> 15)) * 0x735a2d97u;
    return word ^ (word >> 15);
}

ELLE_DEVICE bool Kept(uint32_t word, int64_t column, uint32_t threshold) {
    return (column & 1 ? word >> 16 : word & 0xffffu) >= threshold;
}

}  // namespace elle_mp
