// The kernels for AVX2 with fused multiply-adds.
#if defined(__x86_64__)
#define ELLE_LEVEL avx2
#define ELLE_TARGET __attribute__((target("avx2,fma")))
#define ELLE_WIDTH 8
#include "attention_backward.h"

elle_mp::LevelKernels elle_mp::Avx2Kernels() {
    // bfloat16 is widened when it is packed.
    return {avx2::MakeKernels<float, avx2::Floats>(), avx2::MakeKernels<avx2::BFloat16, avx2::Floats>()};
}
#endif
