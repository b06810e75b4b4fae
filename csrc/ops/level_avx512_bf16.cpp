// The kernels for AVX-512 with products of bfloat16 pairs.
#if defined(__x86_64__)
#define ELLE_LEVEL avx512_bf16
#define ELLE_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")))
#define ELLE_WIDTH 16
#define ELLE_AVX512
#define ELLE_BF16
#include "level_kernels.h"

elle_mp::LevelKernels elle_mp::Avx512Bf16Kernels() { return avx512_bf16::MakeLevel<avx512_bf16::Pairs>(); }
#endif
