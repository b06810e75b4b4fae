// The kernels for AVX-512 without bfloat16 instructions.
#if defined(__x86_64__)
#define ELLE_LEVEL avx512
#define ELLE_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define ELLE_WIDTH 16
#define ELLE_AVX512
#include "level_kernels.h"

elle_mp::LevelKernels elle_mp::Avx512Kernels() { return avx512::MakeLevel<avx512::Floats>(); }
#endif
