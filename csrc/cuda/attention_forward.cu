#include "attention_forward.cuh"
#include "summaries.cuh"

namespace elle_mp {

const char* RunAttentionForward(const Attention& work, Element type, void* stream) {
    if (const char* error = RunSummarise(work, stream)) return error;
    return ChooseKernel(work, type, [&](auto element, auto width, auto drop) {
        typedef decltype(element) T;
        constexpr int kDim = decltype(width)::value, kQueries = kQueriesOf<kDim>;
        return Launch(ForwardTile<T, kDim, decltype(drop)::value>,
                      {(work.queries + kQueries - 1) / kQueries, work.heads, work.batch}, kAttentionThreads,
                      ForwardShared<T, kDim>(), stream, work);
    });
}

}  // namespace elle_mp
