// The kernels for every machine: 128-bit vectors.
#define ELLE_LEVEL plain
#define ELLE_TARGET
#define ELLE_WIDTH 4
#include "attention_backward.h"

elle_mp::LevelKernels elle_mp::PlainKernels() {
    // bfloat16 is widened when it is packed.
    return {plain::MakeKernels<float, plain::Floats>(), plain::MakeKernels<plain::BFloat16, plain::Floats>()};
}
