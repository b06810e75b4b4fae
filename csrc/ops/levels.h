// Which kernels this machine runs.
#pragma once

#include "problem.h"

namespace elle_mp {

// The best instruction level of this machine, or a lower one that the environment variable
// ELLE_MP_INSTRUCTIONS names (plain, avx2, avx512, avx512_bf16): what tests compare. Throws where it names
// another.
const char* LevelName();
LevelKernels Level();

}  // namespace elle_mp
