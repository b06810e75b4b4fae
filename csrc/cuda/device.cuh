// What the kernels of this folder are written in: thread indices, barriers, shuffles, asynchronous copies and
// tensor-core products. nvcc makes machine instructions of it; with ELLE_EMULATED a C++ compiler makes an
// emulation (emulator.h), so that the tests run the same kernels without a GPU.
#pragma once

#include <cstdint>
#include <cstring>

#include "target.h"

#ifdef ELLE_EMULATED
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define ELLE_KERNEL(threads) static __global__ void __launch_bounds__(threads)
#define ELLE_DEVICE static __device__ __forceinline__
#define ELLE_SHARED __shared__
#define ELLE_UNROLL _Pragma("unroll")
#endif

namespace elle_mp {

constexpr int kWarp = 32;

// 16-bit floats as they lie in memory.
struct Bf16 {
    uint16_t bits;
};
struct Fp16 {
    uint16_t bits;
};

// How many blocks a kernel has along x, y and z.
struct Grid {
    int64_t x, y, z;
};

constexpr const char* kTooLarge = "more blocks than one kernel can have";

inline bool FitsGrid(const Grid& grid) {
    return grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x <= 0x7fffffff && grid.y <= 65535 &&
           grid.z <= 65535;
}

#ifdef ELLE_EMULATED

ELLE_DEVICE int ThreadIndex() { return emulator::Here().thread; }
ELLE_DEVICE int BlockSize() { return emulator::Here().threads; }
ELLE_DEVICE int BlockX() { return static_cast<int>(emulator::Here().x); }
ELLE_DEVICE int BlockY() { return static_cast<int>(emulator::Here().y); }
ELLE_DEVICE int BlockZ() { return static_cast<int>(emulator::Here().z); }
ELLE_DEVICE int BlocksX() { return static_cast<int>(emulator::Here().grid_x); }
ELLE_DEVICE void SyncThreads() { emulator::SyncBlock(); }
ELLE_DEVICE void SyncWarp() { emulator::SyncWarp(); }
template <typename T>
ELLE_DEVICE T ShuffleXor(T x, int mask) {
    return emulator::Shuffle(x, (ThreadIndex() % kWarp) ^ mask);
}
// The start of the block's dynamic shared memory, which Launch was told the size of.
ELLE_DEVICE char* SharedMemory() { return emulator::Here().shared; }

ELLE_DEVICE float ToFloat(Bf16 x) { return emulator::FloatOf(static_cast<uint32_t>(x.bits) << 16); }
ELLE_DEVICE float ToFloat(Fp16 x) { return emulator::FromHalf(x.bits); }
template <typename T>
ELLE_DEVICE T FromFloat(float x);
template <>
[[maybe_unused]] inline Bf16 FromFloat<Bf16>(float x) {
    return {emulator::ToBFloat16(x)};
}
template <>
[[maybe_unused]] inline Fp16 FromFloat<Fp16>(float x) {
    return {emulator::ToHalf(x)};
}
ELLE_DEVICE float Exp2(float x) { return __builtin_exp2f(x); }
ELLE_DEVICE float Log(float x) { return __builtin_logf(x); }
ELLE_DEVICE float Exp(float x) { return __builtin_expf(x); }
ELLE_DEVICE float Rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }
ELLE_DEVICE uint32_t HighProduct(uint32_t a, uint32_t b) {
    return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}
// Products and sums that must round one by one, as the CPU's do.
template <typename T>
ELLE_DEVICE T Product(T a, T b) {
    return a * b;
}
template <typename T>
ELLE_DEVICE T Total(T a, T b) {
    return a + b;
}

// Copies 16 bytes to shared memory; zeros where `valid` is false. Both addresses are multiples of 16.
ELLE_DEVICE void CopyAsync(void* to, const void* from, bool valid) {
    emulator::CopyLater(to, valid ? from : nullptr, 16);
}
// Ends a group of copies; WaitCopies waits until all but the last kLeft groups are done.
ELLE_DEVICE void CommitCopies() { emulator::CommitCopies(); }
template <int kLeft>
ELLE_DEVICE void WaitCopies() {
    emulator::WaitCopies(kLeft);
}
// ldmatrix.x4: lanes 8 i to 8 i + 7 give the rows of matrix i (8 x 8 of 16 bits).
ELLE_DEVICE void LoadMatrices(uint32_t (&to)[4], const void* row) { emulator::LoadMatrices(to, row, false); }
ELLE_DEVICE void LoadMatricesTransposed(uint32_t (&to)[4], const void* row) {
    emulator::LoadMatrices(to, row, true);
}
// mma.m16n8k16: c += a b, with c in fp32.
ELLE_DEVICE void Mma(Bf16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulator::Mma(c, a, b0, b1, [](uint16_t bits) { return ToFloat(Bf16{bits}); });
}
ELLE_DEVICE void Mma(Fp16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulator::Mma(c, a, b0, b1, [](uint16_t bits) { return ToFloat(Fp16{bits}); });
}

// Starts a kernel on a stream; null, or what went wrong. Nothing where the grid is empty.
template <typename... Parameters, typename... Arguments>
const char* Launch(void (*kernel)(Parameters...), Grid grid, int threads, int64_t shared, void*,
                   Arguments... arguments) {
    if (!FitsGrid(grid)) return grid.x && grid.y && grid.z ? kTooLarge : nullptr;
    return emulator::Run(grid.x, grid.y, grid.z, threads, shared, [&] { kernel(arguments...); });
}

#else

ELLE_DEVICE int ThreadIndex() { return static_cast<int>(threadIdx.x); }
ELLE_DEVICE int BlockSize() { return static_cast<int>(blockDim.x); }
ELLE_DEVICE int BlockX() { return static_cast<int>(blockIdx.x); }
ELLE_DEVICE int BlockY() { return static_cast<int>(blockIdx.y); }
ELLE_DEVICE int BlockZ() { return static_cast<int>(blockIdx.z); }
ELLE_DEVICE int BlocksX() { return static_cast<int>(gridDim.x); }
ELLE_DEVICE void SyncThreads() { __syncthreads(); }
ELLE_DEVICE void SyncWarp() { __syncwarp(); }
template <typename T>
ELLE_DEVICE T ShuffleXor(T x, int mask) {
    return __shfl_xor_sync(0xffffffffu, x, mask);
}
ELLE_DEVICE char* SharedMemory() {
    extern __shared__ uint4 elle_shared[];
    return reinterpret_cast<char*>(elle_shared);
}

ELLE_DEVICE float ToFloat(Bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
ELLE_DEVICE float ToFloat(Fp16 x) { return __half2float(__ushort_as_half(x.bits)); }
template <typename T>
ELLE_DEVICE T FromFloat(float x);
template <>
__device__ __forceinline__ Bf16 FromFloat<Bf16>(float x) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
__device__ __forceinline__ Fp16 FromFloat<Fp16>(float x) {
    return {__half_as_ushort(__float2half_rn(x))};
}
ELLE_DEVICE float Exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
ELLE_DEVICE float Log(float x) { return logf(x); }
ELLE_DEVICE float Exp(float x) { return expf(x); }
ELLE_DEVICE float Rsqrt(float x) { return rsqrtf(x); }
ELLE_DEVICE uint32_t HighProduct(uint32_t a, uint32_t b) { return __umulhi(a, b); }
template <typename T>
ELLE_DEVICE T Product(T a, T b) {
    if constexpr (sizeof(T) == 8)
        return __dmul_rn(a, b);
    else
        return __fmul_rn(a, b);
}
template <typename T>
ELLE_DEVICE T Total(T a, T b) {
    if constexpr (sizeof(T) == 8)
        return __dadd_rn(a, b);
    else
        return __fadd_rn(a, b);
}

ELLE_DEVICE uint32_t SharedAddress(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
ELLE_DEVICE void CopyAsync(void* to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(SharedAddress(to)), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
}
ELLE_DEVICE void CommitCopies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
ELLE_DEVICE void WaitCopies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}
ELLE_DEVICE void LoadMatrices(uint32_t (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(SharedAddress(row))
                 : "memory");
}
ELLE_DEVICE void LoadMatricesTransposed(uint32_t (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(SharedAddress(row))
                 : "memory");
}
ELLE_DEVICE void Mma(Bf16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
ELLE_DEVICE void Mma(Fp16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <typename... Parameters, typename... Arguments>
const char* Launch(void (*kernel)(Parameters...), Grid grid, int threads, int64_t shared, void* stream,
                   Arguments... arguments) {
    if (!FitsGrid(grid)) return grid.x && grid.y && grid.z ? kTooLarge : nullptr;
    // Up to 48 KB are there for every kernel; more must be asked for.
    if (shared > 48 * 1024) {
        const cudaError_t error =
            cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
        if (error != cudaSuccess) return cudaGetErrorString(error);
    }
    cudaLaunchConfig_t config{};
    config.gridDim =
        dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared);
    config.stream = static_cast<cudaStream_t>(stream);
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

#endif

ELLE_DEVICE float ToFloat(float x) { return x; }
ELLE_DEVICE double ToFloat(double x) { return x; }

// What is computed in for elements of a type: fp32, and fp64 for fp64.
template <typename T>
struct WideOf {
    typedef float Type;
};
template <>
struct WideOf<double> {
    typedef double Type;
};
template <typename T>
using Wide = typename WideOf<T>::Type;

// Calls f(T{}) with the type that stands for an element type.
template <typename F>
const char* WithElement(Element type, const F& f) {
    switch (type) {
        case Element::kFloat:
            return f(float{});
        case Element::kBFloat16:
            return f(Bf16{});
        case Element::kHalf:
            return f(Fp16{});
        default:
            return f(double{});
    }
}

// The same without fp64.
template <typename F>
const char* WithFloatElement(Element type, const F& f) {
#ifdef ELLE_FEW_KERNELS
    return type == Element::kBFloat16 ? f(Bf16{}) : "not built";
#else
    if (type == Element::kFloat) return f(float{});
    return type == Element::kBFloat16 ? f(Bf16{}) : f(Fp16{});
#endif
}

template <typename T>
ELLE_DEVICE T Narrow(Wide<T> x) {
    if constexpr (sizeof(T) == sizeof(Wide<T>))
        return x;
    else
        return FromFloat<T>(x);
}

// Two neighbouring elements in one register, the first in the low half.
template <typename T>
ELLE_DEVICE uint32_t Pair(float first, float second) {
    return static_cast<uint32_t>(FromFloat<T>(first).bits) | static_cast<uint32_t>(FromFloat<T>(second).bits)
                                                                 << 16;
}

ELLE_DEVICE float Larger(float a, float b) { return a > b ? a : b; }
ELLE_DEVICE int Smaller(int a, int b) { return a < b ? a : b; }
ELLE_DEVICE int Bigger(int a, int b) { return a > b ? a : b; }

// Sum over the lanes of a warp, in every lane; always in the same order.
template <typename T>
ELLE_DEVICE T WarpSum(T x) {
    ELLE_UNROLL
    for (int mask = kWarp / 2; mask > 0; mask /= 2) x += ShuffleXor(x, mask);
    return x;
}
template <typename T>
ELLE_DEVICE T WarpMax(T x) {
    ELLE_UNROLL
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
        const T other = ShuffleXor(x, mask);
        x = other > x ? other : x;
    }
    return x;
}

}  // namespace elle_mp
