// The kernels for every machine: 128-bit vectors.
#define ELLE_LEVEL plain
#define ELLE_TARGET
#define ELLE_WIDTH 4
#include "level_kernels.h"

elle_mp::LevelKernels elle_mp::PlainKernels() { return plain::MakeLevel<plain::Floats>(); }
