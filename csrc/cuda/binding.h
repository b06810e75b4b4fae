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
// Exported by torch's CUDA library; its headers declare it only for builds that have the whole toolkit.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace elle_mp {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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
        : guard_(like.get_device_index()) {
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream_));
    }
    void* stream() const { return stream_; }

  private:
    torch::stable::accelerator::DeviceGuard guard_;
    void* stream_ = nullptr;
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
