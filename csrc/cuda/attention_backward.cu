#include "attention_backward.cuh"
#include "summaries.cuh"

namespace elle_mp {

const char* RunAttentionBackward(const Attention& work, Element type, void* stream) {
    if (const char* error = RunSummarise(work, stream)) return error;
    return ChooseKernel(work, type, [&](auto element, auto width, auto drop) {
        typedef decltype(element) T;
        constexpr int kDim = decltype(width)::value, kWarps = kAttentionThreads / kWarp;
        constexpr bool kDrop = decltype(drop)::value;
        const Grid queries{TilesOf(work.queries), work.heads, work.batch};
        const Grid keys{TilesOf(work.keys), work.groups, work.batch};
        const char* error = Launch(Deltas<T>, {(work.queries + kWarps - 1) / kWarps, work.heads, work.batch},
                                   kAttentionThreads, 0, stream, work);
        if (!error)
            error = Launch(QueryGradients<T, kDim, kDrop>, queries, kAttentionThreads,
                           QueriesShared<T, kDim>(), stream, work);
        if (!error)
            error = Launch(KeyGradients<T, kDim, kDrop>, keys, kAttentionThreads, KeysShared<T, kDim>(),
                           stream, work);
        return error;
    });
}

}  // namespace elle_mp
