// The kernels for AVX2 with fused multiply-adds.
#if defined(__x86_64__)
#define ELLE_LEVEL avx2
#define ELLE_TARGET __attribute__((target("avx2,fma")))
#define ELLE_WIDTH 8
#include "level_kernels.h"

elle_mp::LevelKernels elle_mp::Avx2Kernels() { return avx2::MakeLevel<avx2::Floats>(); }
#endif
