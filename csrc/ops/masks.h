// The bits of dropout masks; elle_mp/ops/dropout.py defines them.
#pragma once

#include "../helpers/hashing.h"
#include "vectors.h"

namespace elle_mp {
namespace ELLE_LEVEL {

// Words of the mask of a row: `low` is the low half of its key plus the number of the word, which serves two
// columns, the even one with its low 16 bits.
ELLE_INLINE Bits MaskWords(Bits low, Bits high) {
    Bits word = (low ^ (low >> 16)) * 0x21f0aaadu;
    word ^= high;
    word = (word ^ (word >> 15)) * 0x735a2d97u;
    return word ^ (word >> 15);
}

// The mask of one row of hidden states.
class RowMask {
  public:
    // Columns that one step serves.
    static constexpr int64_t kStep = 2 * kWidth;

    ELLE_INLINE RowMask(const RowMasks& masks, int64_t row) : threshold_(masks.threshold) {
        const int64_t within = row % masks.run;
        const int64_t number = masks.positions ? masks.positions[within] : masks.first_row + within;
        const uint64_t key = Mix64(static_cast<uint64_t>(masks.keys[row / masks.run]) +
                                   static_cast<uint64_t>(number + 1) * kGolden);
        uint32_t first[kWidth];
        for (int i = 0; i < kWidth; ++i) first[i] = static_cast<uint32_t>(key) + static_cast<uint32_t>(i);
        low_ = LoadAs<Bits>(first);
        high_ = Bits{} + static_cast<uint32_t>(key >> 32);
    }

    // x [kStep] at column `column`, a multiple of kStep: zero where it is dropped.
    ELLE_INLINE void Apply(int64_t column, Vec& first, Vec& second) const {
        const Bits word = MaskWords(low_ + static_cast<uint32_t>(column / 2), high_);
#if defined(ELLE_AVX512)
        const __mmask32 keep =
            _mm512_cmpge_epu16_mask((__m512i)word, _mm512_set1_epi16(static_cast<int16_t>(threshold_)));
        first = (Vec)_mm512_maskz_mov_ps(static_cast<__mmask16>(keep), (__m512)first);
        second = (Vec)_mm512_maskz_mov_ps(static_cast<__mmask16>(keep >> 16), (__m512)second);
#else
        // In memory order: the low half of word 0, its high half, the low half of word 1, ...
        Half halves[2];
        static_assert(sizeof halves == sizeof word, "two halves make the words");
        std::memcpy(halves, &word, sizeof halves);
        const Int bound = Int{} + static_cast<int32_t>(threshold_);
        first = (Vec)((Int)first & (__builtin_convertvector(halves[0], Int) >= bound));
        second = (Vec)((Int)second & (__builtin_convertvector(halves[1], Int) >= bound));
#endif
    }

  private:
    uint32_t threshold_;
    Bits low_, high_;
};

}  // namespace ELLE_LEVEL
}  // namespace elle_mp
