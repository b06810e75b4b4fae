// Who compiles: nvcc for a GPU, a C++ compiler for the emulator, or one for the host side of an op alone.
#pragma once

#if defined(__CUDACC__)
#define ELLE_METHOD __device__ __forceinline__
#define ELLE_BOTH __host__ __device__
#else
#define ELLE_METHOD inline
#define ELLE_BOTH
#endif

namespace elle_mp {

// Types of elements.
enum class Element { kFloat, kBFloat16, kHalf, kDouble };

}  // namespace elle_mp
