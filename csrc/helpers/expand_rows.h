// The rows of a grown matrix. Included by expand.cpp once per x86-64 level, each time inside another
// namespace and under another target, so no include guard: unlike ELLE_SIMD's clones, the levels differ in
// their intrinsics. ELLE_LEVEL names the level (GCC does not define __AVX512F__ and the like for a target set
// by a pragma).

#include "expand_draws.h"

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

// One row, in whole vectors. Pointers are held in locals: what is stored through `row` might else change
// them.
template <typename T, bool kScaled, bool kNoise>
inline void FillRow(const Job<T>& job, const T* in, const T* scale, const int32_t* drawn, T* row) {
    constexpr int kWide = kLanesOf<T>;
    const View columns(job.columns);
    const bool paired = !job.partners.empty(), alone = job.alone;
    const View partner = paired ? View(job.partners[0]) : View();
    const bool crowded = job.partners.size() > 1;
    const T* factor = job.factor.data();
    const int64_t width = job.width, shift = job.noise_draw.shift;
    for (int64_t v = 0; v * kWide < width; ++v) {
        Vector<T> x = Fetch<T, kWide>(columns, v, in);
        if (kScaled) x *= Load<T>(scale + v * kWide);
        if (kNoise) {
            // c u - sum u = the sum over the other copies of (u - theirs).
            const Vector<int32_t, kWide> own = Load<int32_t, kWide>(drawn + shift + v * kWide);
            Vector<int32_t, kWide> centred = own;
            if (paired) centred -= Fetch<int32_t, kWide>(partner, v, drawn);
            if (crowded)
                for (std::size_t k = 1; k < job.partners.size(); ++k)
                    centred += own - Fetch<int32_t, kWide>(View(job.partners[k]), v, drawn);
            const Vector<T> noise =
                x * (__builtin_convertvector(centred, Vector<T>) * Load<T>(factor + v * kWide));
            x = alone ? noise : x + noise;
        }
        std::memcpy(row + v * kWide, &x, sizeof x);
    }
}

// Random values where the mask is set, uniform about zero: all of a row in their order, or those of columns
// that ask, from their places.
template <typename T, bool kAll>
inline void PutFresh(const Job<T>& job, const int32_t* drawn, T* row) {
    constexpr int kWide = kLanesOf<T>;
    using Mask = Vector<LaneMask<T>, kWide>;
    const View places(job.asked_places);
    const LaneMask<T>* mask = kAll ? job.allowed.data() : job.asked.data();
    const T factor = static_cast<T>(job.fresh_factor);
    const int64_t width = job.width, shift = job.fresh_draw.shift;
    for (int64_t v = 0; v * kWide < width; ++v) {
        const Mask wanted = Load<LaneMask<T>, kWide>(mask + v * kWide);
        const Vector<int32_t, kWide> bits =
            kAll ? Load<int32_t, kWide>(drawn + shift + v * kWide) : Fetch<int32_t, kWide>(places, v, drawn);
        const Vector<T> value = __builtin_convertvector(2 * bits - kTwiceMean, Vector<T>) * factor;
        Vector<T> x = Load<T>(row + v * kWide);
        x = (Vector<T>)(((Mask)value & wanted) | ((Mask)x & ~wanted));
        std::memcpy(row + v * kWide, &x, sizeof x);
    }
}

// For units with many copies: replaces what was drawn by what is left of it after centring.
template <typename T>
inline void Centre(const Job<T>& job, std::vector<int32_t>& totals, int32_t* drawn) {
    const int64_t shift = job.noise_draw.shift;
    std::fill(totals.begin(), totals.end(), 0);
    for (int64_t j = 0; j < job.width; ++j) totals[job.unit[j]] += drawn[shift + j];
    for (int64_t j = 0; j < job.width; ++j)
        drawn[shift + j] = job.copies[job.unit[j]] * drawn[shift + j] - totals[job.unit[j]];
}

template <typename T>
ELLE_INLINE void Add(T* __restrict__ out, const T* a, const T* b, int64_t count) {
    for (int64_t i = 0; i < count; ++i) out[i] = a[i] + b[i];
}

template <typename T>
ELLE_INLINE void AddTo(T* __restrict__ out, const T* other, int64_t count) {
    for (int64_t i = 0; i < count; ++i) out[i] += other[i];
}

// The sum of a row by halves; `sums` has room for half of it.
template <typename T>
inline T SumByHalves(const T* row, int64_t size, T* sums) {
    int64_t half = size / 2;
    if (half == 0) return row[0];
    Add(sums, row, row + half, half);
    if (size % 2 == 1) sums[0] += row[size - 1];
    for (size = half; size > 1; size = half) {
        half = size / 2;
        AddTo(sums, sums + half, half);
        if (size % 2 == 1) sums[0] += sums[size - 1];
    }
    return sums[0];
}

// The same over rows, some columns of it. After `level` halvings `sizes[level]` rows of sums are left; one of
// them is made when it is wanted, so that a row of sums for each level is all that is held, in a cache.
template <typename T>
struct RowSums {
    const T* rows;
    int64_t stride, count;
    std::vector<int64_t> sizes;
    T* levels;

    void Make(std::size_t level, int64_t k, T* sum) const {
        const int64_t half = sizes[level], size = sizes[level - 1];
        const bool last = k == 0 && size % 2 == 1;
        if (level == 1) {
            Add(sum, rows + k * stride, rows + (k + half) * stride, count);
            if (last) AddTo(sum, rows + (size - 1) * stride, count);
            return;
        }
        T* other = levels + static_cast<int64_t>(level) * count;
        Make(level - 1, k, sum);
        Make(level - 1, k + half, other);
        AddTo(sum, other, count);
        if (!last) return;
        Make(level - 1, size - 1, other);
        AddTo(sum, other, count);
    }
};

// The mean over the rows of the source, columns `begin` to `end`.
template <typename T>
void MeanOfRows(Job<T>& job, int64_t begin, int64_t end) {
    RowSums<T> sums{nullptr, job.source_stride, 0, {job.source_height}, nullptr};
    while (sums.sizes.back() > 1) sums.sizes.push_back(sums.sizes.back() / 2);
    std::vector<T> levels(sums.sizes.size() * std::min<int64_t>(kMeanColumns, end - begin));
    sums.levels = levels.data();
    T* mean = job.mean_row.data();
    for (; begin < end; begin += kMeanColumns) {
        sums.count = std::min<int64_t>(kMeanColumns, end - begin);
        sums.rows = job.source + begin;
        if (job.source_height > 1)
            sums.Make(sums.sizes.size() - 1, 0, mean + begin);
        else
            std::copy(sums.rows, sums.rows + sums.count, mean + begin);
        for (int64_t j = begin; j < begin + sums.count; ++j) mean[j] /= static_cast<T>(job.source_height);
    }
}

// Copies a row, past the caches where that is wanted.
ELLE_INLINE void PutRow(void* out, const void* row, std::size_t bytes, bool stream) {
#if defined(__SSE2__)
    if (stream && bytes >= 256) {
        char* to = static_cast<char*>(out);
        const char* from = static_cast<const char*>(row);
        const std::size_t head = -reinterpret_cast<uintptr_t>(to) % 64;
        std::memcpy(to, from, head);
        std::size_t at = head;
        for (; at + 64 <= bytes; at += 64) {
#if ELLE_LEVEL >= 4
            _mm512_stream_si512(reinterpret_cast<__m512i*>(to + at), _mm512_loadu_si512(from + at));
#else
            for (int k = 0; k < 64; k += 16)
                _mm_stream_si128(reinterpret_cast<__m128i*>(to + at + k),
                                 _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + at + k)));
#endif
        }
        std::memcpy(to + at, from + at, bytes - at);
        return;
    }
#endif
    std::memcpy(out, row, bytes);
}

// Zeros, past the caches.
inline void PutZeros(char* to, std::size_t bytes) {
    const std::size_t head = std::min<std::size_t>(-reinterpret_cast<uintptr_t>(to) % 64, bytes);
    std::memset(to, 0, head);
    std::size_t at = head;
#if ELLE_LEVEL >= 4
    for (; at + 64 <= bytes; at += 64)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to + at), _mm512_setzero_si512());
#elif defined(__SSE2__)
    for (; at + 16 <= bytes; at += 16)
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + at), _mm_setzero_si128());
#endif
    std::memset(to + at, 0, bytes - at);
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

// What a thread works with.
template <typename T>
struct Scratch {
    explicit Scratch(const Job<T>& job)
        : scales(job.scaled ? kScaleRows * job.columns.index.size() : 0),
          drawn(std::max({job.noise_draw.count, job.fresh_draw.count, job.asked_draw.count})),
          totals(job.copies.size()),
          longer(job.mean_column ? job.source_width + 1 : 0),
          halves(job.mean_column ? std::max<int64_t>(1, job.source_width / 2) : 0),
          row(job.columns.index.size()),
          noise_keys(job.noise_draw.key),
          fresh_keys(job.fresh_draw.key) {}
    std::vector<T> scales;  // of the last few scales of rows: maps have few, in turns
    std::vector<int32_t> drawn;
    std::vector<int32_t> totals;
    std::vector<T> longer;  // a row of the source, and its mean
    std::vector<T> halves;
    std::vector<T> row;
    RoundKeys noise_keys, fresh_keys;
    int64_t longer_of = -2;
    double scale_of[kScaleRows] = {};
    int scales_made = 0;
};

// What the columns of a row are scaled by.
template <typename T>
inline const T* ScaleRow(const Job<T>& job, double row_scale, Scratch<T>& scratch) {
    const std::size_t padded = job.columns.index.size();
    const int known = std::min(scratch.scales_made, kScaleRows);
    for (int k = 0; k < known; ++k)
        if (scratch.scale_of[k] == row_scale) return scratch.scales.data() + k * padded;
    const int place = scratch.scales_made++ % kScaleRows;
    T* scale = scratch.scales.data() + place * padded;
    scratch.scale_of[place] = row_scale;
    for (int64_t j = 0; j < job.width; ++j)
        scale[j] = static_cast<T>(job.col_scale == nullptr ? row_scale : row_scale * job.col_scale[j]);
    return scale;
}

// The row of the source that row `i` is made of.
template <typename T>
inline const T* SourceRow(const Job<T>& job, int64_t i, Scratch<T>& scratch) {
    const int64_t r = job.rows[i];
    const T* in = r == kMean ? job.mean_row.data() : job.source + r * job.source_stride;
    if (!job.mean_column) return in;
    if (scratch.longer_of != r) {
        std::memcpy(static_cast<void*>(scratch.longer.data()), in, job.source_width * sizeof(T));
        scratch.longer[job.source_width] =
            SumByHalves(in, job.source_width, scratch.halves.data()) / static_cast<T>(job.source_width);
        scratch.longer_of = r;
    }
    return scratch.longer.data();
}

// Makes row `i` of what the source says, scaled, with its noise.
template <typename T>
inline void MakeRow(const Job<T>& job, int64_t i, const T* in, bool scaled, bool noise, Scratch<T>& scratch) {
    const double row_scale = job.row_scale == nullptr ? 1.0 : job.row_scale[i];
    T* row = scratch.row.data();
    const T* scale = scaled ? ScaleRow(job, row_scale, scratch) : nullptr;
    int32_t* drawn = scratch.drawn.data();
    if (noise) {
        const Draw& draw = job.noise_draw;
        FillDrawn<kNoiseBits>(scratch.noise_keys, draw.first_row + i, draw.counter, draw.count, drawn);
        if (!job.copies.empty()) Centre(job, scratch.totals, drawn);
        scaled ? FillRow<T, true, true>(job, in, scale, drawn, row)
               : FillRow<T, false, true>(job, in, nullptr, drawn, row);
    } else if (job.alone) {
        std::fill(scratch.row.begin(), scratch.row.end(), T(0));
    } else {
        scaled ? FillRow<T, true, false>(job, in, scale, nullptr, row)
               : FillRow<T, false, false>(job, in, nullptr, nullptr, row);
    }
}

// The random values of row `i`, where all of it or some columns ask for them.
template <typename T>
inline void DrawFresh(const Job<T>& job, int64_t i, bool all, Scratch<T>& scratch) {
    const Draw& draw = all ? job.fresh_draw : job.asked_draw;
    int32_t* drawn = scratch.drawn.data();
    FillDrawn<kFreshBits>(scratch.fresh_keys, draw.first_row + i, draw.counter, draw.count, drawn);
    all ? PutFresh<T, true>(job, drawn, scratch.row.data())
        : PutFresh<T, false>(job, drawn, scratch.row.data());
}

template <typename T>
void ExpandRows(const Job<T>& job, int64_t begin, int64_t end) {
    const std::size_t bytes = job.width * sizeof(T);
    Scratch<T> scratch(job);
    bool made = false;  // scratch.row holds what the source says of row i - 1, and nothing else
    for (int64_t i = begin; i < end; ++i) {
        T* out = job.out + i * job.out_stride;
        const double row_scale = job.row_scale == nullptr ? 1.0 : job.row_scale[i];
        const bool scaled = job.scaled && (job.col_scale != nullptr || row_scale != 1.0);
        const bool noise = job.noise && job.rows[i] != kMean;
        const uint8_t code = job.fresh_rows == nullptr ? kForbidden : job.fresh_rows[i];
        const bool fresh = code == kRandom || (code != kForbidden && job.any_asked);
        const bool again = made && !noise && job.rows[i] == job.rows[i - 1] &&
                           (job.row_scale == nullptr || row_scale == job.row_scale[i - 1]);
        if (!again) {
            const T* in = SourceRow(job, i, scratch);
            if (job.contiguous && !scaled && !noise && !fresh && !job.alone) {
                PutRow(out, in + job.columns.index[0], bytes, job.stream);
                made = false;
                continue;
            }
            MakeRow(job, i, in, scaled, noise, scratch);
        }
        made = !noise && !fresh;
        if (fresh) DrawFresh(job, i, code == kRandom, scratch);
        PutRow(out, scratch.row.data(), bytes, job.stream);
    }
#if defined(__SSE2__)
    if (job.stream) _mm_sfence();
#endif
}
