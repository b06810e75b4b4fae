// What the host side of every op of this folder needs from torch: its stable ABI, the current stream, checks.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "target.h"

// The tests' build registers the same ops elsewhere, for tensors on the CPU.
#ifdef ELLE_EMULATED
#define ELLE_LIBRARY elle_mp_emulated
#define ELLE_KEY CPU
#else
#define ELLE_LIBRARY elle_mp
#define ELLE_KEY CUDA
#include <dlfcn.h>
#endif

namespace elle_mp {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#ifndef ELLE_EMULATED
// The current stream of a device. Asked of torch's CUDA library, which the process has loaded; linking with
// it would want a CUDA build of torch where this library is built.
inline void* CurrentStream(int32_t device) {
    typedef AOTITorchError (*Get)(int32_t, void**);
    static const Get get = [] {
        void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
        const char* name = "aoti_torch_get_current_cuda_stream";
        return reinterpret_cast<Get>(dlsym(library ? library : RTLD_DEFAULT, name));
    }();
    STD_TORCH_CHECK(get != nullptr, "elle_mp: torch's CUDA library is not loaded");
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(get(device, &stream));
    return stream;
}
#endif

// The device of a call and its current stream.
class Device {
  public:
    explicit Device(const Tensor& like)
#ifdef ELLE_EMULATED
    {
        STD_TORCH_CHECK(like.is_cpu(), "the emulator wants tensors on the CPU");
    }
    void* stream() const { return nullptr; }
#else
        : guard_(like.get_device_index()), stream_(CurrentStream(like.get_device_index())) {
    }
    void* stream() const { return stream_; }

  private:
    torch::stable::accelerator::DeviceGuard guard_;
    void* stream_;
#endif
};

// Raises what went wrong when a kernel was started.
inline void Check(const char* error) { STD_TORCH_CHECK(error == nullptr, "elle_mp: ", error); }

inline Tensor EmptyOf(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
    return torch::stable::empty(sizes, type, std::nullopt, like.device());
}

inline std::vector<int64_t> SizesOf(const Tensor& x) {
    std::vector<int64_t> sizes;
    for (int64_t i = 0; i < x.dim(); ++i) sizes.push_back(x.size(i));
    return sizes;
}

// Raises unless `x` lies on the device of `like`, is contiguous, and has this type and number of elements.
inline void CheckFits(const Tensor& x, const Tensor& like, ScalarType type, int64_t numel, const char* name) {
    STD_TORCH_CHECK(
        x.is_cpu() == like.is_cpu() && x.scalar_type() == type && x.numel() == numel && x.is_contiguous(),
        name, " does not fit");
}

template <typename T>
T* DataOf(const Tensor& x) {
    return static_cast<T*>(x.data_ptr());
}

inline Element ElementOf(const Tensor& x, const char* op) {
    const ScalarType type = x.scalar_type();
    if (type == ScalarType::Float) return Element::kFloat;
    if (type == ScalarType::BFloat16) return Element::kBFloat16;
    if (type == ScalarType::Half) return Element::kHalf;
    STD_TORCH_CHECK(type == ScalarType::Double, op,
                    " has kernels for float32, bfloat16, float16 and float64");
    return Element::kDouble;
}

}  // namespace elle_mp
