// Parts of Philox4x32-10's words, which noise and random values are made of. Included by expand_rows.h, once
// per x86-64 level as that is, so no include guard.

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

// front[0], back[0], front[1], back[1], ... in 64-bit lanes, cut into numbers of kBits bits, each in 32 bits.
template <int kBits>
ELLE_INLINE void StoreCut(U64 front, U64 back, int32_t* out) {
#if ELLE_LEVEL >= 4
    const __m512i low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
    const __m512i high = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
    const __m512i half[2] = {_mm512_permutex2var_epi64((__m512i)front, low, (__m512i)back),
                             _mm512_permutex2var_epi64((__m512i)front, high, (__m512i)back)};
    for (int n = 0; n < 2; ++n) {
        int32_t* to = out + n * (512 / kBits);
        if constexpr (kBits == 16) {
            _mm512_storeu_si512(to, _mm512_cvtepu16_epi32(_mm512_castsi512_si256(half[n])));
            _mm512_storeu_si512(to + 16, _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(half[n], 1)));
        } else {
            _mm512_storeu_si512(to, _mm512_cvtepu8_epi32(_mm512_castsi512_si128(half[n])));
            _mm512_storeu_si512(to + 16, _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(half[n], 1)));
            _mm512_storeu_si512(to + 32, _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(half[n], 2)));
            _mm512_storeu_si512(to + 48, _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(half[n], 3)));
        }
    }
#else
    constexpr int kParts = 64 / kBits;
    constexpr uint64_t kMask = (uint64_t{1} << kBits) - 1;
    for (int i = 0; i < 8; ++i)
        for (int part = 0; part < kParts; ++part) {
            out[2 * kParts * i + part] = static_cast<int32_t>(front[i] >> (kBits * part) & kMask);
            out[2 * kParts * i + kParts + part] = static_cast<int32_t>(back[i] >> (kBits * part) & kMask);
        }
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

// drawn[c] for the columns of 8 * kAbreast counters, in one row: Philox4x32-10. A round waits for the one
// before, so several counters' rounds go side by side where there are registers for them.
template <int kAbreast, int kBits>
ELLE_INLINE void FillSome(const RoundKeys& keys, uint64_t row, uint64_t counter, int32_t* drawn) {
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
    // A counter's four words are neighbouring columns.
#pragma GCC unroll 4
    for (int n = 0; n < kAbreast; ++n)
        StoreCut<kBits>((x0[n] & 0xffffffffu) | (x1[n] << 32), (x2[n] & 0xffffffffu) | (x3[n] << 32),
                        drawn + n * (1024 / kBits));
}

// The same for `count` columns, a multiple of those of eight counters.
template <int kBits>
inline void FillDrawn(const RoundKeys& keys, int64_t row, uint32_t counter, int64_t count, int32_t* drawn) {
    constexpr int kAbreast = ELLE_LEVEL >= 4 ? 4 : 1;
    constexpr int64_t kColumns = 1024 / kBits;
    const uint64_t row_bits = static_cast<uint64_t>(row);
    uint64_t next = counter;
    int64_t c = 0;
    for (; c + kColumns * kAbreast <= count; c += kColumns * kAbreast, next += 8 * kAbreast)
        FillSome<kAbreast, kBits>(keys, row_bits, next, drawn + c);
#if ELLE_LEVEL >= 4
    const int64_t rest = (count - c) / kColumns;
    if (rest == 3) FillSome<3, kBits>(keys, row_bits, next, drawn + c);
    if (rest == 2) FillSome<2, kBits>(keys, row_bits, next, drawn + c);
    if (rest == 1) FillSome<1, kBits>(keys, row_bits, next, drawn + c);
#endif
}
