// The counter-based hash that sample order and masks are made of. elle_mp/data/hashing.py is its NumPy twin.
#pragma once

#include <cstdint>

namespace elle_mp {

constexpr uint64_t kGolden = 0x9e3779b97f4a7c15ULL;
constexpr uint64_t kSecond = 0xd1b54a32d192ed03ULL;

// The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): a bijection of 64-bit words.
inline uint64_t Mix64(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
    return x ^ (x >> 31);
}

}  // namespace elle_mp
