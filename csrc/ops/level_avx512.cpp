// The kernels for AVX-512 without bfloat16 instructions.
#if defined(__x86_64__)
#define ELLE_LEVEL avx512
#define ELLE_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define ELLE_WIDTH 16
#define ELLE_AVX512
#include "attention_backward.h"

elle_mp::LevelKernels elle_mp::Avx512Kernels() {
    // bfloat16 is widened when it is packed.
    return {avx512::MakeKernels<float, avx512::Floats>(),
            avx512::MakeKernels<avx512::BFloat16, avx512::Floats>()};
}
#endif
