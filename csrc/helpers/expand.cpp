// Growth of one matrix in one pass. elle_mp/ops/expand.py is the PyTorch twin, equal bit for bit.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "expansion.h"
#include "parallel.h"
#include "simd.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
// GCC's own AVX-512 header triggers it (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace py = pybind11;

namespace elle_mp {
namespace {

typedef uint64_t U64 __attribute__((vector_size(64)));

template <typename T>
constexpr int kLanesOf = 64 / sizeof(T);

template <typename T, int kWide>
struct VectorOf {
    typedef T Type __attribute__((vector_size(sizeof(T) * kWide)));
};

template <typename T, int kWide = kLanesOf<T>>
using Vector = typename VectorOf<T, kWide>::Type;

template <typename T, int kWide = kLanesOf<T>>
ELLE_INLINE Vector<T, kWide> Load(const T* p) {
    Vector<T, kWide> x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

// Indices of the elements that make a row, padded to whole vectors.
struct Gather {
    std::vector<int64_t> index;
    std::vector<int64_t> base;    // of each vector: start of two vectors that hold all its elements, or -1
    std::vector<uint8_t> offset;  // index - base, where there is a base
};

struct View {
    View() = default;
    explicit View(const Gather& map)
        : index(map.index.data()), base(map.base.data()), offset(map.offset.data()) {}
    const int64_t* index = nullptr;
    const int64_t* base = nullptr;
    const uint8_t* offset = nullptr;
};

// An index that stands for the mean over the axis.
constexpr int64_t kMean = -1;
// Copies of one unit up to which a column is compared with each of its partners.
constexpr int64_t kFewCopies = 8;
constexpr int64_t kMostCopies = 1 << 15;
// Entries below which a second thread costs more than it saves.
constexpr int64_t kSerialEntries = 1 << 14;
// Bytes from which on a matrix is written past the caches: it would not stay there, and its old contents need
// not be read.
constexpr int64_t kStreamBytes = 1 << 20;
// Columns of a mean over rows that are summed at a time, so that their sums stay in a cache.
constexpr int64_t kMeanColumns = 2048;
// Rows of scales that a thread keeps.
constexpr int kScaleRows = 4;

// What a row or a column says of random values.
constexpr uint8_t kRandom = 1;
constexpr uint8_t kForbidden = 2;
// Random bits of a column: noise needs to tell copies apart, new values are what a model starts from.
constexpr int kNoiseBits = 8, kFreshBits = 16;
constexpr int32_t kTwiceMean = 65535;  // twice the mean of 16 random bits

template <typename T>
using LaneMask = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

// Random bits of each column, from the first column of `counter` on; column 0 of the block is `shift` later.
struct Draw {
    Draw() = default;
    Draw(uint64_t key, int64_t first_row, int64_t first_col, int64_t width, int bits)
        : key(key),
          first_row(first_row),
          counter(static_cast<uint32_t>(first_col / (128 / bits))),
          shift(first_col % (128 / bits)),
          count((shift + width + 1024 / bits - 1) / (1024 / bits) * (1024 / bits)) {}
    uint64_t key = 0;
    int64_t first_row = 0;
    uint32_t counter = 0;
    int64_t shift = 0, count = 0;
};

template <typename T>
struct Job {
    const T* source;
    T* out;
    int64_t source_stride, out_stride;
    int64_t source_height, source_width;
    const int64_t* rows;
    const double* row_scale;  // null for ones
    const double* col_scale;  // null for ones
    int64_t width;
    Gather columns;
    std::vector<T> mean_row;  // where some row is the mean
    bool mean_column;         // some column is; the mean stands behind a row's last element
    bool scaled, contiguous, stream;
    // Noise.
    bool noise, alone;  // alone: without the value that it is relative to
    Draw noise_draw;
    std::vector<T> factor;
    std::vector<Gather> partners;  // few copies: the next copy, the one after that, ...
    std::vector<int64_t> unit;     // many copies: the unit of each column,
    std::vector<int32_t> copies;   // and the number of its copies
    // Random values.
    const uint8_t* fresh_rows;         // null for none
    std::vector<LaneMask<T>> asked;    // all ones in columns that ask for random values
    std::vector<LaneMask<T>> allowed;  // and in those that do not forbid them
    bool any_asked;
    double fresh_factor;
    Draw fresh_draw,
        asked_draw;       // of whole rows, by column; of columns that ask, by their number among these
    Gather asked_places;  // of each column: its random value, if it asks for one
};

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
// No level between: what AVX2 adds was measured to gain nothing over the base.
#define ELLE_EXPAND_LEVELS
namespace v4 {
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#define ELLE_LEVEL 4
#include "expand_rows.h"
#undef ELLE_LEVEL
#pragma GCC pop_options
}  // namespace v4
#endif
namespace base {
#define ELLE_LEVEL 1
#include "expand_rows.h"
#undef ELLE_LEVEL
}  // namespace base

template <typename T>
void Rows(const Job<T>& job, int64_t begin, int64_t end) {
#if defined(ELLE_EXPAND_LEVELS)
    if (__builtin_cpu_supports("x86-64-v4")) return v4::ExpandRows(job, begin, end);
#endif
    base::ExpandRows(job, begin, end);
}

template <typename T>
void Means(Job<T>& job, int64_t begin, int64_t end) {
#if defined(ELLE_EXPAND_LEVELS)
    if (__builtin_cpu_supports("x86-64-v4")) return v4::MeanOfRows(job, begin, end);
#endif
    base::MeanOfRows(job, begin, end);
}

void Zeros(char* to, std::size_t bytes) {
#if defined(ELLE_EXPAND_LEVELS)
    if (__builtin_cpu_supports("x86-64-v4")) return v4::PutZeros(to, bytes);
#endif
    base::PutZeros(to, bytes);
}

// `size` elements may be read; `wide` of them make a vector.
void MakeGather(Gather& map, const int64_t* index, int64_t count, int wide, int64_t size) {
    const int64_t vectors = (count + wide - 1) / wide;
    map.index.assign(index, index + count);
    map.index.resize(vectors * wide, index[count - 1]);
    map.base.assign(vectors, -1);
    map.offset.resize(vectors * wide);
    if (size < 2 * wide) return;
    for (int64_t v = 0; v < vectors; ++v) {
        const int64_t* first = map.index.data() + v * wide;
        int64_t least = first[0], most = first[0];
        for (int i = 1; i < wide; ++i) {
            least = std::min(least, first[i]);
            most = std::max(most, first[i]);
        }
        const int64_t base = std::min(least, size - 2 * wide);
        if (most - base >= 2 * wide) continue;
        map.base[v] = base;
        for (int i = 0; i < wide; ++i) map.offset[v * wide + i] = static_cast<uint8_t>(first[i] - base);
    }
}

// Whether some index stands for the mean.
bool CheckIndices(const int64_t* index, int64_t count, int64_t size) {
    bool bad = size == 0, mean = false;
    for (int64_t i = 0; i < count; ++i) {
        bad |= index[i] < kMean || index[i] >= size;
        mean |= index[i] == kMean;
    }
    if (bad) throw std::invalid_argument("expand wants indices from 0 to " + std::to_string(size - 1));
    return mean;
}

template <typename T>
void PlanNoise(Job<T>& job, const int64_t* groups, double strength, double std) {
    const int64_t width = job.width;
    const int64_t padded = static_cast<int64_t>(job.columns.index.size());
    job.noise = true;
    std::vector<int64_t> order(width), starts;
    std::iota(order.begin(), order.end(), 0);
    if (!std::is_sorted(groups, groups + width))
        std::stable_sort(order.begin(), order.end(),
                         [groups](int64_t a, int64_t b) { return groups[a] < groups[b]; });
    for (int64_t t = 0; t < width; ++t)
        if (t == 0 || groups[order[t]] != groups[order[t - 1]]) starts.push_back(t);
    starts.push_back(width);
    int64_t most = 1;
    for (std::size_t g = 0; g + 1 < starts.size(); ++g) most = std::max(most, starts[g + 1] - starts[g]);
    if (most > kMostCopies)
        throw std::invalid_argument("expand makes noise for at most " + std::to_string(kMostCopies) +
                                    " copies of a unit, got " + std::to_string(most));
    const bool few = most <= kFewCopies;
    std::vector<std::vector<int64_t>> partners(few ? std::max<int64_t>(1, most - 1) : 0);
    for (auto& partner : partners) partner.resize(width);
    job.factor.assign(padded, T(0));
    if (!few) job.unit.resize(width);
    for (std::size_t g = 0; g + 1 < starts.size(); ++g) {
        const int64_t begin = starts[g], count = starts[g + 1] - begin;
        if (!few) job.copies.push_back(static_cast<int32_t>(count));
        for (int64_t t = 0; t < count; ++t) {
            const int64_t j = order[begin + t];
            job.factor[j] = static_cast<T>(strength / (static_cast<double>(count) * std));
            if (!few) job.unit[j] = static_cast<int64_t>(g);
            // A unit with fewer copies than the most is its own partner for the rest, which adds nothing.
            for (std::size_t k = 0; k < partners.size(); ++k) {
                const int64_t step = static_cast<int64_t>(k) + 1;
                partners[k][j] =
                    job.noise_draw.shift + (step < count ? order[begin + (t + step) % count] : j);
            }
        }
    }
    job.partners.resize(partners.size());
    for (std::size_t k = 0; k < partners.size(); ++k)
        MakeGather(job.partners[k], partners[k].data(), width, kLanesOf<T>, job.noise_draw.count);
}

template <typename T>
int64_t RowStride(const py::array_t<T>& x, const char* name) {
    if (x.ndim() != 2 || (x.shape(1) > 1 && x.strides(1) != static_cast<py::ssize_t>(sizeof(T))) ||
        x.strides(0) % static_cast<py::ssize_t>(sizeof(T)) != 0)
        throw std::invalid_argument(std::string("expand wants two dimensions and contiguous columns of ") +
                                    name);
    return x.strides(0) / static_cast<py::ssize_t>(sizeof(T));
}

using Indices = py::array_t<int64_t, py::array::c_style>;
using Scales = py::array_t<double, py::array::c_style>;

const double* ScaleOrOnes(const py::object& scale, int64_t size) {
    if (scale.is_none()) return nullptr;
    if (!Scales::check_(scale)) throw std::invalid_argument("expand wants contiguous fp64 scales");
    const auto array = py::reinterpret_borrow<Scales>(scale);
    if (array.size() != size) throw std::invalid_argument("expand wants a scale for each row and column");
    const double* data = array.data();
    return std::all_of(data, data + size, [](double x) { return x == 1.0; }) ? nullptr : data;
}

using Codes = py::array_t<uint8_t, py::array::c_style>;

// Where the zero-sum noise and the random values come from, as Python hands them over.
struct Draws {
    py::object groups;
    uint64_t noise_key;
    double strength;
    bool alone;
    py::object fresh_rows, fresh_cols;
    uint64_t fresh_key;
    double factor;
    int64_t first_row, first_col;
    int64_t first_asked;  // columns before the block's that ask for random values
};

template <typename T>
void PlanFresh(Job<T>& job, const uint8_t* rows, const uint8_t* cols, const Draws& draws) {
    job.fresh_rows = rows;
    job.fresh_factor = draws.factor;
    job.asked.assign(job.columns.index.size(), 0);
    job.allowed = job.asked;
    std::vector<int64_t> places(job.width);
    int64_t asked = 0;
    for (int64_t j = 0; j < job.width; ++j) {
        job.asked[j] = cols[j] == kRandom ? -1 : 0;
        job.allowed[j] = cols[j] == kForbidden ? 0 : -1;
        places[j] = asked;
        asked += cols[j] == kRandom;
    }
    job.any_asked = asked > 0;
    if (!job.any_asked) return;
    job.asked_draw = Draw(draws.fresh_key, draws.first_row, draws.first_asked, asked, kFreshBits);
    for (int64_t& place : places) place = job.asked_draw.shift + std::min(place, asked - 1);
    MakeGather(job.asked_places, places.data(), job.width, kLanesOf<T>, job.asked_draw.count);
}

template <typename Array>
const typename Array::value_type* Column(const py::object& values, int64_t size, const char* message) {
    if (values.is_none()) return nullptr;
    if (!Array::check_(values)) throw std::invalid_argument(message);
    const auto array = py::reinterpret_borrow<Array>(values);
    if (array.size() != size) throw std::invalid_argument(message);
    return array.data();
}

// The growth of one matrix; its arrays live for as long as it does.
template <typename T>
class ExpansionOf : public Expansion {
  public:
    ExpansionOf(const py::array_t<T>& source, const Indices& rows, const Indices& cols,
                const py::object& row_scale, const py::object& col_scale, py::array_t<T>& out,
                const Draws& draws, double std)
        : Expansion(rows.size(), cols.size()),
          draws_(draws),
          std_(std),
          cols_(cols.data()),
          held_{source, rows, cols, row_scale, col_scale, out} {
        if (out.ndim() != 2 || out.shape(0) != height || out.shape(1) != width)
            throw std::invalid_argument("expand wants an index for each row and column of out");
        if (height == 0 || width == 0) return;
        job_.width = width;
        job_.source_stride = RowStride(source, "source");
        job_.out_stride = RowStride(out, "out");
        job_.source_height = source.shape(0);
        job_.source_width = source.shape(1);
        mean_row_ = CheckIndices(rows.data(), height, job_.source_height);
        job_.mean_column = CheckIndices(cols.data(), width, job_.source_width);
        job_.source = source.data();
        job_.out = out.mutable_data();
        job_.rows = rows.data();
        job_.row_scale = ScaleOrOnes(row_scale, height);
        job_.col_scale = ScaleOrOnes(col_scale, width);
        job_.scaled = job_.row_scale != nullptr || job_.col_scale != nullptr;
        groups_ = Column<Indices>(draws.groups, width, "expand wants a group for each column");
        fresh_rows_ = Column<Codes>(draws.fresh_rows, height, "expand wants a code for each row");
        fresh_cols_ = Column<Codes>(draws.fresh_cols, width, "expand wants a code for each column");
    }

    void Prepare(int threads) override {
        std::vector<int64_t> columns(cols_, cols_ + width);
        for (int64_t& index : columns) index = index == kMean ? job_.source_width : index;
        MakeGather(job_.columns, columns.data(), width, kLanesOf<T>, job_.source_width + job_.mean_column);
        job_.contiguous = true;
        for (int64_t j = 1; j < width; ++j) job_.contiguous &= columns[j] == columns[j - 1] + 1;
        job_.stream = height * width * static_cast<int64_t>(sizeof(T)) >= kStreamBytes;
        const int64_t padded = static_cast<int64_t>(job_.columns.index.size());
        job_.alone = draws_.alone;
        job_.noise_draw = Draw(draws_.noise_key, draws_.first_row, draws_.first_col, padded, kNoiseBits);
        job_.fresh_draw = Draw(draws_.fresh_key, draws_.first_row, draws_.first_col, padded, kFreshBits);
        if (groups_ != nullptr) PlanNoise(job_, groups_, draws_.strength, std_);
        if (fresh_rows_ != nullptr && fresh_cols_ != nullptr)
            PlanFresh(job_, fresh_rows_, fresh_cols_, draws_);
        if (!mean_row_) return;
        job_.mean_row.resize(job_.source_width);
        ParallelFor(job_.source_width, threads,
                    [this](int64_t begin, int64_t end) { Means(job_, begin, end); });
    }

    void Make(int64_t begin, int64_t end) const override { Rows(job_, begin, end); }

  private:
    Job<T> job_{};
    const Draws draws_;
    const double std_;
    const int64_t* cols_;
    const int64_t* groups_ = nullptr;
    const uint8_t *fresh_rows_ = nullptr, *fresh_cols_ = nullptr;
    bool mean_row_ = false;
    const std::vector<py::object> held_;
};

// Nothing but zeros.
class ZeroExpansion : public Expansion {
  public:
    explicit ZeroExpansion(py::array& out)
        : Expansion((out.nbytes() + kPiece - 1) / kPiece, kPiece),
          out_(static_cast<char*>(out.mutable_data())),
          bytes_(out.nbytes()),
          held_(out) {
        if (!(out.flags() & py::array::c_style)) throw std::invalid_argument("expand wants contiguous zeros");
    }
    void Prepare(int) override {}
    void Make(int64_t begin, int64_t end) const override {
        Zeros(out_ + begin * kPiece, std::min(end * kPiece, bytes_) - begin * kPiece);
    }

  private:
    static constexpr int64_t kPiece = 1 << 14;
    char* const out_;
    const int64_t bytes_;
    const py::object held_;
};

void Run(Expansion& expansion, int threads) {
    const py::gil_scoped_release release;
    const int64_t entries = expansion.height * expansion.width;
    if (entries == 0) return;
    const int used = entries < kSerialEntries ? 1 : threads;
    expansion.Prepare(used);
    ParallelFor(expansion.height, used, [&](int64_t begin, int64_t end) { expansion.Make(begin, end); });
}

template <typename T>
void Register(py::module_& m) {
    using py::arg;
    m.def(
        "expansion",
        [](const py::array_t<T>& source, const Indices& rows, const Indices& cols,
           const py::object& row_scale, const py::object& col_scale, py::array_t<T>& out, const Draws& draws,
           double std) -> std::unique_ptr<Expansion> {
            return std::make_unique<ExpansionOf<T>>(source, rows, cols, row_scale, col_scale, out, draws,
                                                    std);
        },
        arg("source").noconvert(), arg("rows").noconvert(), arg("cols").noconvert(), arg("row_scale"),
        arg("col_scale"), arg("out").noconvert(), arg("draws"), arg("std"),
        "source[rows][:, cols], scaled, with zero-sum noise over columns of one group and with random values "
        "where they are asked for, to be written into out.");
}

}  // namespace

void register_expand(py::module_& m) {
    py::class_<Draws>(m, "Draws")
        .def(py::init([](py::object groups, uint64_t noise_key, double strength, bool alone,
                         py::object fresh_rows, py::object fresh_cols, uint64_t fresh_key, double factor,
                         int64_t first_row, int64_t first_col, int64_t first_asked) {
                 return Draws{std::move(groups),
                              noise_key,
                              strength,
                              alone,
                              std::move(fresh_rows),
                              std::move(fresh_cols),
                              fresh_key,
                              factor,
                              first_row,
                              first_col,
                              first_asked};
             }),
             py::arg("groups"), py::arg("noise_key"), py::arg("strength"), py::arg("alone"),
             py::arg("fresh_rows"), py::arg("fresh_cols"), py::arg("fresh_key"), py::arg("factor"),
             py::arg("first_row"), py::arg("first_col"), py::arg("first_asked"));
    py::class_<Expansion>(m, "Expansion").def("run", &Run, py::arg("threads"));
    Register<float>(m);
    Register<double>(m);
    m.def(
        "zeros",
        [](py::array& out) -> std::unique_ptr<Expansion> { return std::make_unique<ZeroExpansion>(out); },
        py::arg("out").noconvert(), "Zeros, to be written into out.");
    py::class_<ExpansionQueue>(m, "ExpansionQueue")
        .def(py::init<int>(), py::arg("threads"))
        .def("push", &ExpansionQueue::Push, py::arg("expansion"))
        .def("finish", &ExpansionQueue::Finish);
}

}  // namespace elle_mp
