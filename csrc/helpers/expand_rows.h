// The rows of a grown matrix. Included by expand.cpp once per x86-64 level, each time inside another
// namespace and under another target, so no include guard: unlike ELLE_SIMD's clones, the levels differ in
// their intrinsics. ELLE_LEVEL names the level (GCC does not define __AVX512F__ and the like for a target set
// by a pragma).

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

// sums[c] for the `count` (a multiple of 32) columns that start at 4 * counter, in one row: Philox4x32-10.
inline void FillSums(uint64_t key, int64_t row, uint32_t counter, int64_t count, int32_t* sums) {
    const U64 lane = {0, 1, 2, 3, 4, 5, 6, 7};
    const uint64_t row_bits = static_cast<uint64_t>(row);
    for (int64_t c = 0; c < count; c += 32) {
        // Words in 64-bit lanes; what the upper halves hold is of no interest.
        U64 x0 = lane + (static_cast<uint64_t>(c) / 4 + counter);
        U64 x1 = U64{} + row_bits;
        U64 x2 = U64{} + (row_bits >> 32);
        U64 x3 = {};
        uint32_t key0 = static_cast<uint32_t>(key);
        uint32_t key1 = static_cast<uint32_t>(key >> 32);
#pragma GCC unroll 10
        for (int round = 0; round < 10; ++round) {
            const U64 p0 = MultiplyWords(x0, 0xd2511f53u);
            const U64 p1 = MultiplyWords(x2, 0xcd9e8d57u);
            x0 = (p1 >> 32) ^ x1 ^ static_cast<uint64_t>(key0);
            x1 = p1;
            x2 = (p0 >> 32) ^ x3 ^ static_cast<uint64_t>(key1);
            x3 = p0;
            key0 += 0x9e3779b9u;
            key1 += 0xbb67ae85u;
        }
        // A counter's four words are four neighbouring columns.
        StoreInTurns(ByteSums((x0 & 0xffffffffu) | (x1 << 32)), ByteSums((x2 & 0xffffffffu) | (x3 << 32)),
                     sums + c);
    }
}

#if ELLE_LEVEL >= 4
// Lane i is element offset[i] of the two vectors that start at `window`.
ELLE_INLINE Vector<float> Pick(const float* window, const uint8_t* offset) {
    const __m512i lane = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(offset)));
    return (Vector<float>)_mm512_permutex2var_ps(_mm512_loadu_ps(window), lane, _mm512_loadu_ps(window + 16));
}

ELLE_INLINE Vector<double> Pick(const double* window, const uint8_t* offset) {
    const __m512i lane = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(offset)));
    return (Vector<double>)_mm512_permutex2var_pd(_mm512_loadu_pd(window), lane, _mm512_loadu_pd(window + 8));
}

template <int kWide>
ELLE_INLINE Vector<int32_t, kWide> Pick(const int32_t* window, const uint8_t* offset) {
    if constexpr (kWide == 16) {
        const __m512i lane = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(offset)));
        return (Vector<int32_t>)_mm512_permutex2var_epi32(_mm512_loadu_si512(window), lane,
                                                          _mm512_loadu_si512(window + 16));
    } else {
        const __m256i lane = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(offset)));
        const __m256i* pair = reinterpret_cast<const __m256i*>(window);
        return (Vector<int32_t, 8>)_mm256_permutex2var_epi32(_mm256_loadu_si256(pair), lane,
                                                             _mm256_loadu_si256(pair + 1));
    }
}

// Lane i is in[index[i]].
ELLE_INLINE Vector<double> Collect(const double* in, const int64_t* index) {
    return (Vector<double>)_mm512_i64gather_pd(_mm512_loadu_si512(index), in, 8);
}

ELLE_INLINE Vector<float> Collect(const float* in, const int64_t* index) {
    const __m256 half = _mm512_i64gather_ps(_mm512_loadu_si512(index), in, 4);
    const __m256 rest = _mm512_i64gather_ps(_mm512_loadu_si512(index + 8), in, 4);
    return (Vector<float>)_mm512_insertf32x8(_mm512_castps256_ps512(half), rest, 1);
}

template <int kWide>
ELLE_INLINE Vector<int32_t, kWide> Collect(const int32_t* in, const int64_t* index) {
    const __m256i half = _mm512_i64gather_epi32(_mm512_loadu_si512(index), in, 4);
    if constexpr (kWide == 8) {
        return (Vector<int32_t, 8>)half;
    } else {
        const __m256i rest = _mm512_i64gather_epi32(_mm512_loadu_si512(index + 8), in, 4);
        return (Vector<int32_t>)_mm512_inserti32x8(_mm512_castsi256_si512(half), rest, 1);
    }
}
#endif

// Elements number `map.index` of vector `v`: two loads and a shuffle where they lie close, as in all maps of
// growth.
template <typename T, int kWide>
ELLE_INLINE Vector<T, kWide> Fetch(const View& map, int64_t v, const T* in) {
#if ELLE_LEVEL >= 4
    const int64_t base = map.base[v];
    if constexpr (std::is_same_v<T, int32_t>)
        return base >= 0 ? Pick<kWide>(in + base, map.offset + v * kWide)
                         : Collect<kWide>(in, map.index + v * kWide);
    else
        return base >= 0 ? Pick(in + base, map.offset + v * kWide) : Collect(in, map.index + v * kWide);
#else
    const int64_t* index = map.index + v * kWide;
    T lanes[kWide];
    for (int i = 0; i < kWide; ++i) lanes[i] = in[index[i]];
    return Load<T, kWide>(lanes);
#endif
}

// One row. Pointers are held in locals: what is stored through `out` might else change them.
template <typename T, bool kScaled, bool kNoise>
inline void FillRow(const Job<T>& job, const T* in, const T* scale, const int32_t* sums, T* out) {
    constexpr int kWide = kLanesOf<T>;
    const View columns(job.columns);
    const bool paired = !job.partners.empty();
    const View partner = paired ? View(job.partners[0]) : View();
    const bool crowded = job.partners.size() > 1;
    const T* factor = job.factor.data();
    const int64_t width = job.width, shift = job.shift;
    for (int64_t v = 0; v * kWide < width; ++v) {
        Vector<T> x = Fetch<T, kWide>(columns, v, in);
        if (kScaled) x *= Load<T>(scale + v * kWide);
        if (kNoise) {
            // c S - sum S = the sum over the other copies of (S - theirs).
            const Vector<int32_t, kWide> own = Load<int32_t, kWide>(sums + shift + v * kWide);
            Vector<int32_t, kWide> centred = own;
            if (paired) centred -= Fetch<int32_t, kWide>(partner, v, sums);
            if (crowded)
                for (std::size_t k = 1; k < job.partners.size(); ++k)
                    centred += own - Fetch<int32_t, kWide>(View(job.partners[k]), v, sums);
            x += x * (__builtin_convertvector(centred, Vector<T>) * Load<T>(factor + v * kWide));
        }
        const int64_t left = std::min<int64_t>(kWide, width - v * kWide);
        if (left == kWide)
            std::memcpy(out + v * kWide, &x, sizeof x);
        else
            std::memcpy(static_cast<void*>(out + v * kWide), &x, left * sizeof(T));
    }
}

// For units with many copies: replaces sums by what is left of them after centring.
template <typename T>
inline void Centre(const Job<T>& job, std::vector<int32_t>& totals, int32_t* sums) {
    std::fill(totals.begin(), totals.end(), 0);
    for (int64_t j = 0; j < job.width; ++j) totals[job.unit[j]] += sums[job.shift + j];
    for (int64_t j = 0; j < job.width; ++j)
        sums[job.shift + j] = job.copies[job.unit[j]] * sums[job.shift + j] - totals[job.unit[j]];
}

template <typename T>
void ExpandRows(const Job<T>& job, int64_t begin, int64_t end) {
    const std::size_t padded = job.columns.index.size();
    const std::size_t bytes = job.width * sizeof(T);
    std::vector<T> scale(job.scaled ? padded : 0);
    std::vector<int32_t> sums(job.sums), totals(job.copies.size());
    bool scale_known = false;
    double scale_row = 1.0;
    for (int64_t i = begin; i < end; ++i) {
        const T* in = job.source + job.rows[i] * job.source_stride;
        T* out = job.out + i * job.out_stride;
        const double row_scale = job.row_scale == nullptr ? 1.0 : job.row_scale[i];
        const bool scaled = job.scaled && (job.col_scale != nullptr || row_scale != 1.0);
        const bool plain = job.contiguous && !scaled && !job.noise;
        const bool again = !job.noise && i > begin && job.rows[i] == job.rows[i - 1] &&
                           (job.row_scale == nullptr || row_scale == job.row_scale[i - 1]);
        if (plain || again) {
            const T* from = again ? out - job.out_stride : in + job.columns.index[0];
            std::memcpy(static_cast<void*>(out), from, bytes);
            continue;
        }
        if (scaled && !(scale_known && scale_row == row_scale)) {
            for (int64_t j = 0; j < job.width; ++j)
                scale[j] =
                    static_cast<T>(job.col_scale == nullptr ? row_scale : row_scale * job.col_scale[j]);
            scale_known = true;
            scale_row = row_scale;
        }
        if (job.noise) {
            FillSums(job.key, job.first_row + i, job.counter, job.sums, sums.data());
            if (!job.copies.empty()) Centre(job, totals, sums.data());
            scaled ? FillRow<T, true, true>(job, in, scale.data(), sums.data(), out)
                   : FillRow<T, false, true>(job, in, nullptr, sums.data(), out);
        } else {
            scaled ? FillRow<T, true, false>(job, in, scale.data(), nullptr, out)
                   : FillRow<T, false, false>(job, in, nullptr, nullptr, out);
        }
    }
}

// Random values where a row or a column asks for them and neither forbids it.
template <typename T>
void FillRandomRows(const RandomJob<T>& job, int64_t begin, int64_t end) {
    std::vector<int32_t> sums(job.sums);
    for (int64_t i = begin; i < end; ++i) {
        const std::vector<int64_t>& places = job.rows[i] == kRandom ? job.allowed : job.asked;
        if (job.rows[i] == kForbidden || places.empty()) continue;
        FillSums(job.key, job.first_row + i, job.counter, job.sums, sums.data());
        T* out = job.out + i * job.stride;
        for (const int64_t j : places)
            out[j] = static_cast<T>((sums[job.shift + j] - kMeanOfSums) * job.factor);
    }
}
