// The rows of a grown matrix. Included by expand.cpp once per x86-64 level, each time inside another
// namespace and under another target, so no include guard: unlike ELLE_SIMD's clones, the levels differ in
// their intrinsics. ELLE_LEVEL names the level (GCC does not define __AVX512F__ and the like for a target set
// by a pragma).

// Low 32 bits of each lane times `factor` (32 bits), 64-bit products.
ELLE_INLINE U64 MultiplyWords(U64 x, uint64_t factor) {
#if ELLE_LEVEL >= 4
    return (U64)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(static_cast<int64_t>(factor)));
#elif ELLE_LEVEL >= 3
    __m256i half[2];
    std::memcpy(half, &x, sizeof x);
    for (__m256i& h : half) h = _mm256_mul_epu32(h, _mm256_set1_epi64x(static_cast<int64_t>(factor)));
    std::memcpy(&x, half, sizeof x);
    return x;
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
    U32 x = (U32)words;
    x = (x & 0x00ff00ffu) + ((x >> 8) & 0x00ff00ffu);
    return (U64)((x + (x >> 16)) & 0xffffu);
}

// sums[c] for the `count` (a multiple of 32) columns that start at 4 * counter, in one row: Philox4x32-10.
inline void FillSums(uint64_t key, int64_t row, uint32_t counter, int64_t count, int32_t* sums) {
    const U64 lane = {0, 1, 2, 3, 4, 5, 6, 7};
    const U64 low = {0, 8, 1, 9, 2, 10, 3, 11};
    const U64 high = {4, 12, 5, 13, 6, 14, 7, 15};
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
        const U64 front = ByteSums((x0 & 0xffffffffu) | (x1 << 32));
        const U64 back = ByteSums((x2 & 0xffffffffu) | (x3 << 32));
        // A counter's four words are four neighbouring columns.
        const U64 out[2] = {__builtin_shuffle(front, back, low), __builtin_shuffle(front, back, high)};
        std::memcpy(sums + c, out, sizeof out);
    }
}

// Lane i is element lane[i] of the two vectors that start at `window`.
template <typename T, int kWide>
ELLE_INLINE Vector<T, kWide> Pick(const T* window, Vector<uint8_t, kWide> lane) {
    using Lane = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
    return __builtin_shuffle(Load<T, kWide>(window), Load<T, kWide>(window + kWide),
                             __builtin_convertvector(lane, Vector<Lane, kWide>));
}

// Elements number `map.index` of vector `v`: two loads and a shuffle where they lie close, as under every map
// of growth.
template <typename T, int kWide>
ELLE_INLINE Vector<T, kWide> Fetch(const Gather& map, int64_t v, const T* in) {
#if ELLE_LEVEL >= 4
    if (map.base[v] >= 0)
        return Pick<T, kWide>(in + map.base[v], Load<uint8_t, kWide>(map.offset.data() + v * kWide));
#endif
    const int64_t* index = map.index.data() + v * kWide;
    T lanes[kWide];
    for (int i = 0; i < kWide; ++i) lanes[i] = in[index[i]];
    return Load<T, kWide>(lanes);
}

template <typename T, bool kScaled, bool kNoise>
ELLE_INLINE Vector<T> Entries(const Job<T>& job, int64_t v, const T* in, const T* scale,
                              const int32_t* sums) {
    constexpr int kWide = kLanesOf<T>;
    Vector<T> x = Fetch<T, kWide>(job.columns, v, in);
    if (kScaled) x *= Load<T>(scale + v * kWide);
    if (kNoise) {
        // c S - sum S = the sum over the other copies of (S - theirs).
        const Vector<int32_t, kWide> own = Load<int32_t, kWide>(sums + job.shift + v * kWide);
        Vector<int32_t, kWide> centred = own;
        if (!job.partners.empty()) {
            centred = own - Fetch<int32_t, kWide>(job.partners[0], v, sums);
            for (std::size_t k = 1; k < job.partners.size(); ++k)
                centred += own - Fetch<int32_t, kWide>(job.partners[k], v, sums);
        }
        const Vector<T> relative =
            __builtin_convertvector(centred, Vector<T>) * Load<T>(job.factor.data() + v * kWide);
        x += x * relative;
    }
    return x;
}

template <typename T, bool kScaled, bool kNoise>
inline void FillRow(const Job<T>& job, const T* in, const T* scale, const int32_t* sums, T* out) {
    constexpr int kWide = kLanesOf<T>;
    const int64_t whole = job.width / kWide;
    for (int64_t v = 0; v < whole; ++v) {
        const Vector<T> x = Entries<T, kScaled, kNoise>(job, v, in, scale, sums);
        std::memcpy(out + v * kWide, &x, sizeof x);
    }
    if (whole * kWide == job.width) return;
    const Vector<T> x = Entries<T, kScaled, kNoise>(job, whole, in, scale, sums);
    std::memcpy(static_cast<void*>(out + whole * kWide), &x, (job.width - whole * kWide) * sizeof(T));
}

// Copies past the caches: what is written once and not soon read need not be fetched first.
inline void Stream(void* to, const void* from, std::size_t size) {
#if defined(__SSE2__)
    char* out = static_cast<char*>(to);
    const char* in = static_cast<const char*>(from);
    const std::size_t head = std::min(size, (64 - reinterpret_cast<std::uintptr_t>(out) % 64) % 64);
    std::memcpy(out, in, head);
    std::size_t i = head;
    for (; i + 64 <= size; i += 64) {
#if ELLE_LEVEL >= 4
        _mm512_stream_si512(reinterpret_cast<__m512i*>(out + i), _mm512_loadu_si512(in + i));
#else
        for (int k = 0; k < 64; k += 16)
            _mm_stream_si128(reinterpret_cast<__m128i*>(out + i + k),
                             _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i + k)));
#endif
    }
    std::memcpy(out + i, in + i, size - i);
#else
    std::memcpy(to, from, size);
#endif
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
    std::vector<T> scratch(job.stream ? padded : 0), scale(job.scaled ? padded : 0);
    std::vector<int32_t> sums(job.sums), totals(job.copies.size());
    bool scale_known = false;
    double scale_row = 1.0;
    const T* ready = nullptr;  // the row before, where it can be used again
    for (int64_t i = begin; i < end; ++i) {
        const T* in = job.source + job.rows[i] * job.source_stride;
        T* out = job.out + i * job.out_stride;
        const double row_scale = job.row_scale == nullptr ? 1.0 : job.row_scale[i];
        const bool scaled = job.scaled && (job.col_scale != nullptr || row_scale != 1.0);
        if (job.contiguous && !scaled && !job.noise) {
            const T* from = in + job.columns.index[0];
            job.stream ? Stream(out, from, bytes) : (void)std::memcpy(static_cast<void*>(out), from, bytes);
            ready = nullptr;
            continue;
        }
        const bool again = ready != nullptr && job.rows[i] == job.rows[i - 1] &&
                           (job.row_scale == nullptr || row_scale == job.row_scale[i - 1]);
        if (again) {
            job.stream ? Stream(out, ready, bytes) : (void)std::memcpy(static_cast<void*>(out), ready, bytes);
            continue;
        }
        if (scaled && !(scale_known && scale_row == row_scale)) {
            for (int64_t j = 0; j < job.width; ++j)
                scale[j] =
                    static_cast<T>(job.col_scale == nullptr ? row_scale : row_scale * job.col_scale[j]);
            scale_known = true;
            scale_row = row_scale;
        }
        T* row = job.stream ? scratch.data() : out;
        if (job.noise) {
            FillSums(job.key, job.first_row + i, job.counter, job.sums, sums.data());
            if (!job.copies.empty()) Centre(job, totals, sums.data());
            scaled ? FillRow<T, true, true>(job, in, scale.data(), sums.data(), row)
                   : FillRow<T, false, true>(job, in, nullptr, sums.data(), row);
        } else {
            scaled ? FillRow<T, true, false>(job, in, scale.data(), nullptr, row)
                   : FillRow<T, false, false>(job, in, nullptr, nullptr, row);
            ready = row;
        }
        if (job.stream) Stream(out, row, bytes);
    }
#if defined(__SSE2__)
    if (job.stream) _mm_sfence();
#endif
}
