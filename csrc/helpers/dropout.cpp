// Counter-based dropout. NumPy in and out; bfloat16 as uint16.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

#include "counter.h"
#include "parallel.h"

namespace py = pybind11;

namespace elle_mp {
namespace {

ELLE_INLINE void MaskedCopy(const BFloat16* in, BFloat16* out, I32 keep, float scale) {
    Store(out, (F32)((I32)(Load(in) * scale) & keep));
}

ELLE_INLINE void MaskedCopy(const float* in, float* out, I32 keep, float scale) {
    Store(out, (F32)((I32)(Load(in) * scale) & keep));
}

ELLE_INLINE void MaskedCopy(const double* in, double* out, I32 keep, double scale) {
    for (int i = 0; i < kLanes; ++i) out[i] = keep[i] ? in[i] * scale : 0.0;
}

template <typename T, typename S>
ELLE_INLINE void DropRow(const T* in, T* out, int64_t columns, const MaskRow& mask, S scale) {
    int64_t column = 0;
    for (; column + kMaskColumns <= columns; column += kMaskColumns) {
        const Keep keep = mask.At(column);
        MaskedCopy(in + column, out + column, keep.low, scale);
        MaskedCopy(in + column + kLanes, out + column + kLanes, keep.high, scale);
    }
    if (column == columns) return;
    T source[kMaskColumns] = {};
    T target[kMaskColumns];
    const std::size_t left = (columns - column) * sizeof(T);
    std::memcpy(static_cast<void*>(source), in + column, left);
    const Keep keep = mask.At(column);
    MaskedCopy(source, target, keep.low, scale);
    MaskedCopy(source + kLanes, target + kLanes, keep.high, scale);
    std::memcpy(static_cast<void*>(out + column), target, left);
}

struct DropRows {
    const void* in;
    void* out;
    const int64_t* keys;
    int64_t rows, columns, first_row;
    uint32_t threshold;
    double scale;
};

template <typename T, typename S>
ELLE_INLINE void Drop(const DropRows& work, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
        const MaskRow mask(static_cast<uint64_t>(work.keys[r / work.rows]), work.first_row + r % work.rows,
                           work.threshold);
        DropRow(static_cast<const T*>(work.in) + r * work.columns,
                static_cast<T*>(work.out) + r * work.columns, work.columns, mask, static_cast<S>(work.scale));
    }
}

ELLE_SIMD void DropBFloat16(const DropRows& work, int64_t begin, int64_t end) {
    Drop<BFloat16, float>(work, begin, end);
}
ELLE_SIMD void DropFloat(const DropRows& work, int64_t begin, int64_t end) {
    Drop<float, float>(work, begin, end);
}
ELLE_SIMD void DropDouble(const DropRows& work, int64_t begin, int64_t end) {
    Drop<double, double>(work, begin, end);
}

// x, out: [B, rows, columns] contiguous; keys: [B].
template <typename T>
void Dropout(const py::array_t<T, py::array::c_style>& x, py::array_t<T, py::array::c_style>& out,
             const py::array_t<int64_t, py::array::c_style>& keys, int64_t first_row, uint32_t threshold,
             double scale, int threads) {
    if (x.ndim() != 3 || out.ndim() != 3 || x.size() != out.size() || keys.size() != x.shape(0))
        throw std::invalid_argument("dropout wants x and out [B, rows, columns] and keys [B]");
    const DropRows work{x.data(),   out.mutable_data(), keys.data(), x.shape(1),
                        x.shape(2), first_row,          threshold,   scale};
    const int64_t rows = x.shape(0) * x.shape(1);
    py::gil_scoped_release release;
    ParallelFor(rows, threads, [&work](int64_t begin, int64_t end) {
        if (sizeof(T) == 2) return DropBFloat16(work, begin, end);
        if (sizeof(T) == 4) return DropFloat(work, begin, end);
        DropDouble(work, begin, end);
    });
}

template <typename T>
void Register(py::module_& m) {
    using py::arg;
    m.def("dropout", &Dropout<T>, arg("x").noconvert(), arg("out").noconvert(), arg("keys").noconvert(),
          arg("first_row"), arg("threshold"), arg("scale"), arg("threads"),
          "Masks x [B, rows, columns] into out; uint16 arrays hold bfloat16 bits.");
}

}  // namespace

void register_dropout(py::module_& m) {
    Register<uint16_t>(m);
    Register<float>(m);
    Register<double>(m);
}

}  // namespace elle_mp
