#include "attention_forward.cuh"
#include "summaries.cuh"

namespace elle_mp {

const char* RunAttentionForward(const Attention& work, Element type, void* stream) {
    if (const char* error = RunSummarise(work, stream)) return error;
    return ChooseKernel(work, type, [&](auto element, auto width, auto drop) {
        typedef decltype(element) T;
        constexpr int kDim = decltype(width)::value;
        return Launch(ForwardTile<T, kDim, decltype(drop)::value>,
                      {TilesOf(work.queries), work.heads, work.batch}, kAttentionThreads,
                      ForwardShared<T, kDim>(), stream, work);
    });
}

}  // namespace elle_mp
