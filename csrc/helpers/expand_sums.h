// Sums of the bytes of Philox4x32-10's words, which noise and random values are made of. Included by
// expand_rows.h, once per x86-64 level as that is, so no include guard.

// Low 32 bits of each lane times `factor` (32 bits), 64-bit products.
ELLE_INLINE U64 MultiplyWords(U64 x, uint64_t factor) {
#if ELLE_LEVEL >= 4
    return (U64)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(static_cast<int64_t>(factor)));
#elif defined(__SSE2__)
    __m128i quarter[4];
    std::memcpy(quarter, &x, sizeof x);
    for (__m128i& q : quarter) q = _mm_mul_epu32(q, _mm_set1_epi64x(static_cast<int64_t>(factor)));
    std::memcpy(&x, quarter, sizeof x);
    return x;
#else
    return (x & 0xffffffffu) * factor;
#endif
}

// Sums of the four bytes of each 32-bit lane.
ELLE_INLINE U64 ByteSums(U64 words) {
#if ELLE_LEVEL >= 4
    const __m512i pairs = _mm512_maddubs_epi16((__m512i)words, _mm512_set1_epi8(1));
    return (U64)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#else
    U32 x = (U32)words;
    x = (x & 0x00ff00ffu) + ((x >> 8) & 0x00ff00ffu);
    return (U64)((x + (x >> 16)) & 0xffffu);
#endif
}

// out = front[0], back[0], front[1], back[1], ... in 64-bit lanes.
ELLE_INLINE void StoreInTurns(U64 front, U64 back, int32_t* out) {
#if ELLE_LEVEL >= 4
    const __m512i low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
    const __m512i high = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
    _mm512_storeu_si512(out, _mm512_permutex2var_epi64((__m512i)front, low, (__m512i)back));
    _mm512_storeu_si512(out + 16, _mm512_permutex2var_epi64((__m512i)front, high, (__m512i)back));
#else
    uint64_t lanes[16];
    for (int i = 0; i < 8; ++i) {
        lanes[2 * i] = front[i];
        lanes[2 * i + 1] = back[i];
    }
    std::memcpy(out, lanes, sizeof lanes);
#endif
}

// The round keys of Philox4x32-10, in all lanes.
struct RoundKeys {
    explicit RoundKeys(uint64_t key) {
        for (int round = 0; round < 10; ++round) {
            first[round] = U64{} + static_cast<uint32_t>(key + round * 0x9e3779b9ull);
            second[round] = U64{} + static_cast<uint32_t>((key >> 32) + round * 0xbb67ae85ull);
        }
    }
    U64 first[10], second[10];
};

// sums[c] for the 32 * kAbreast columns that start at 4 * counter, in one row: Philox4x32-10. A round waits
// for the one before, so several columns' rounds go side by side where there are registers for them.
template <int kAbreast>
ELLE_INLINE void FillSome(const RoundKeys& keys, uint64_t row, uint64_t counter, int32_t* sums) {
    const U64 lane = {0, 1, 2, 3, 4, 5, 6, 7};
    // Words in 64-bit lanes; what the upper halves hold is of no interest.
    U64 x0[kAbreast], x1[kAbreast], x2[kAbreast], x3[kAbreast];
#pragma GCC unroll 4
    for (int n = 0; n < kAbreast; ++n) {
        x0[n] = lane + (counter + 8 * n);
        x1[n] = U64{} + row;
        x2[n] = U64{} + (row >> 32);
        x3[n] = U64{};
    }
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 4
        for (int n = 0; n < kAbreast; ++n) {
            const U64 p0 = MultiplyWords(x0[n], 0xd2511f53u);
            const U64 p1 = MultiplyWords(x2[n], 0xcd9e8d57u);
            x0[n] = (p1 >> 32) ^ x1[n] ^ keys.first[round];
            x1[n] = p1;
            x2[n] = (p0 >> 32) ^ x3[n] ^ keys.second[round];
            x3[n] = p0;
        }
    }
    // A counter's four words are four neighbouring columns.
#pragma GCC unroll 4
    for (int n = 0; n < kAbreast; ++n)
        StoreInTurns(ByteSums((x0[n] & 0xffffffffu) | (x1[n] << 32)),
                     ByteSums((x2[n] & 0xffffffffu) | (x3[n] << 32)), sums + 32 * n);
}

// The same for `count` columns, a multiple of 32.
inline void FillSums(const RoundKeys& keys, int64_t row, uint32_t counter, int64_t count, int32_t* sums) {
    constexpr int kAbreast = ELLE_LEVEL >= 4 ? 4 : 1;
    const uint64_t row_bits = static_cast<uint64_t>(row), first = counter;
    int64_t c = 0;
    for (; c + 32 * kAbreast <= count; c += 32 * kAbreast)
        FillSome<kAbreast>(keys, row_bits, first + static_cast<uint64_t>(c) / 4, sums + c);
    for (; c < count; c += 32) FillSome<1>(keys, row_bits, first + static_cast<uint64_t>(c) / 4, sums + c);
}
