// All kernels of one instruction level, for the file that compiles it.
#pragma once

#include "attention_backward.h"
#include "cross_entropy_rows.h"
#include "embedding_rows.h"
#include "norm_rows.h"
#include "philox_runs.h"

namespace elle_mp {
namespace ELLE_LEVEL {

// `Unit`: what products of bfloat16 are made of; without instructions for them they are widened when they are
// packed.
template <typename Unit>
ELLE_TARGET inline LevelKernels MakeLevel() {
    return {MakeKernels<float, Floats>(),
            MakeKernels<BFloat16, Unit>(),
            MakeCrossEntropy<float>(),
            MakeCrossEntropy<BFloat16>(),
            NormalRun,
            MakeNorms<float>(),
            MakeNorms<BFloat16>(),
            MakeEmbedding<float>(),
            MakeEmbedding<BFloat16>()};
}

}  // namespace ELLE_LEVEL
}  // namespace elle_mp
