// The counter-based bits of dropout masks. elle_mp/ops/dropout.py is the PyTorch twin, equal bit for bit.
#pragma once

#include <cstdint>

#include "hashing.h"
#include "simd.h"

namespace elle_mp {

// Columns that one step of MaskRow serves: 16 words of two 16-bit halves.
constexpr int kMaskColumns = 32;

struct Keep {
    I32 low;   // all ones where columns 0 to 15 are kept
    I32 high;  // columns 16 to 31
};

class MaskRow {
  public:
    ELLE_INLINE MaskRow(uint64_t sample_key, int64_t row, uint32_t threshold) : threshold_(threshold) {
        const uint64_t key = Mix64(sample_key + static_cast<uint64_t>(row + 1) * kGolden);
        low_ = static_cast<uint32_t>(key);
        high_ = static_cast<uint32_t>(key >> 32);
    }

    // The mask of columns `column` to `column + 31`; `column` is a multiple of 32.
    ELLE_INLINE Keep At(int64_t column) const {
        const U32 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        U32 word = lane + (static_cast<uint32_t>(column / 2) + low_);
        word = (word ^ (word >> 16)) * 0x21f0aaadu;
        word ^= high_;
        word = (word ^ (word >> 15)) * 0x735a2d97u;
        word ^= word >> 15;
        // Column 2j takes the low half of word j and column 2j + 1 the high half: memory order.
        U16 halves[2];
        static_assert(sizeof halves == sizeof word, "two halves make the words");
        std::memcpy(halves, &word, sizeof halves);
        const U16 bound = U16{} + static_cast<uint16_t>(threshold_);
        typedef int16_t I16 __attribute__((vector_size(32)));
        return {__builtin_convertvector((I16)(halves[0] >= bound), I32),
                __builtin_convertvector((I16)(halves[1] >= bound), I32)};
    }

  private:
    uint32_t low_;
    uint32_t high_;
    uint32_t threshold_;
};

}  // namespace elle_mp
