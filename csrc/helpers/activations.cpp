// GELU and its gradient on bfloat16 (as uint16): PyTorch's take several times as long on the CPU.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "parallel.h"
#include "simd.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=fast")
#endif

namespace py = pybind11;

namespace elle_mp {
namespace {

using Array = py::array_t<uint16_t, py::array::c_style>;

constexpr float kRootTwoOverPi = 0.7978845608028654f;
constexpr float kCubic = 0.044715f;
constexpr float kInvRootTwoPi = 0.3989422804014327f;
constexpr float kInvRootTwo = 0.7071067811865476f;

struct Parts {
    F32 cdf;      // what x is multiplied by
    F32 density;  // its derivative
};

// (1 + tanh u) / 2 = 1 / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3).
ELLE_INLINE Parts TanhParts(F32 x) {
    const F32 square = x * x;
    const F32 u = x * (square * kCubic + 1.0f) * kRootTwoOverPi;
    const F32 cdf = 1.0f / (Exp(u * -2.0f) + 1.0f);
    return {cdf, cdf * (1.0f - cdf) * (square * (3.0f * kCubic) + 1.0f) * (2.0f * kRootTwoOverPi)};
}

// The normal distribution function by Abramowitz and Stegun 7.1.26 (error under 1.5e-7).
ELLE_INLINE Parts ErfParts(F32 x) {
    const F32 bell = Exp(x * x * -0.5f);
    const F32 z = (F32)((I32)x & 0x7fffffff) * kInvRootTwo;
    const F32 t = 1.0f / (z * 0.3275911f + 1.0f);
    F32 tail = t * 1.061405429f - 1.453152027f;
    tail = tail * t + 1.421413741f;
    tail = tail * t - 0.284496736f;
    tail = tail * t + 0.254829592f;
    tail = tail * t * bell * 0.5f;
    return {Choose(x < 0.0f, tail, 1.0f - tail), bell * kInvRootTwoPi};
}

struct Elements {
    const BFloat16* x;
    const BFloat16* grad;  // null for the forward pass
    BFloat16* out;
    int64_t count;
};

template <bool kTanh>
ELLE_INLINE F32 Value(F32 x) {
    return x * (kTanh ? TanhParts(x).cdf : ErfParts(x).cdf);
}

template <bool kTanh>
ELLE_INLINE F32 Slope(F32 x) {
    const Parts parts = kTanh ? TanhParts(x) : ErfParts(x);
    return x * parts.density + parts.cdf;
}

template <bool kTanh>
ELLE_INLINE void Gelu(const Elements& work, int64_t begin, int64_t end) {
    int64_t i = begin * kLanes;
    const int64_t stop = std::min(end * kLanes, work.count);
    if (work.grad == nullptr) {
        for (; i + kLanes <= stop; i += kLanes) Store(work.out + i, Value<kTanh>(Load(work.x + i)));
    } else {
        for (; i + kLanes <= stop; i += kLanes)
            Store(work.out + i, Slope<kTanh>(Load(work.x + i)) * Load(work.grad + i));
    }
    if (i >= stop) return;
    const int left = static_cast<int>(stop - i);
    const F32 x = LoadTail(work.x + i, left, 0.0f);
    const F32 y =
        work.grad == nullptr ? Value<kTanh>(x) : Slope<kTanh>(x) * LoadTail(work.grad + i, left, 0.0f);
    StoreTail(work.out + i, y, left);
}

ELLE_SIMD void GeluTanh(const Elements& work, int64_t begin, int64_t end) { Gelu<true>(work, begin, end); }
ELLE_SIMD void GeluErf(const Elements& work, int64_t begin, int64_t end) { Gelu<false>(work, begin, end); }

void Run(const Array& x, const BFloat16* grad, Array& out, bool tanh, int threads) {
    if (x.size() != out.size()) throw std::invalid_argument("gelu arrays must have one size");
    const Elements work{reinterpret_cast<const BFloat16*>(x.data()), grad,
                        reinterpret_cast<BFloat16*>(out.mutable_data()), x.size()};
    py::gil_scoped_release release;
    ParallelFor((work.count + kLanes - 1) / kLanes, threads, [&work, tanh](int64_t begin, int64_t end) {
        tanh ? GeluTanh(work, begin, end) : GeluErf(work, begin, end);
    });
}

void Forward(const Array& x, Array out, bool tanh, int threads) { Run(x, nullptr, out, tanh, threads); }

void Backward(const Array& x, const Array& grad, Array out, bool tanh, int threads) {
    if (x.size() != grad.size()) throw std::invalid_argument("gelu arrays must have one size");
    Run(x, reinterpret_cast<const BFloat16*>(grad.data()), out, tanh, threads);
}

}  // namespace

void register_activations(py::module_& m) {
    using py::arg;
    m.def("gelu", &Forward, arg("x").noconvert(), arg("out").noconvert(), arg("tanh"), arg("threads"),
          "GELU of bfloat16 bits x into out; tanh chooses the approximation of GPT-2.");
    m.def("gelu_backward", &Backward, arg("x").noconvert(), arg("grad").noconvert(), arg("out").noconvert(),
          arg("tanh"), arg("threads"), "grad times the slope of GELU at x, into out; all bfloat16 bits.");
}

}  // namespace elle_mp
