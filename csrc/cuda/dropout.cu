#include "dropout.h"
#include "masks.cuh"

namespace elle_mp {
namespace {

constexpr int kThreads = 256;

// A thread takes pairs of columns (one word of the mask each); a block the pairs of one row, in strides.
template <typename T>
ELLE_KERNEL(kThreads)
Drop(DropRows work) {
    const int64_t row = BlockX();
    const MaskKey key = RowKey(work.keys[row / work.rows], work.first_row + row % work.rows);
    const T* x = static_cast<const T*>(work.x) + row * work.columns;
    T* out = static_cast<T*>(work.out) + row * work.columns;
    const Wide<T> scale = static_cast<Wide<T>>(work.scale);
    for (int64_t pair = ThreadIndex(); 2 * pair < work.columns; pair += BlockSize()) {
        const uint32_t word = MaskWord(key, static_cast<uint32_t>(pair));
        for (int64_t c = 2 * pair; c < 2 * pair + 2 && c < work.columns; ++c)
            out[c] = Narrow<T>(Kept(word, c, work.threshold) ? ToFloat(x[c]) * scale : Wide<T>(0));
    }
}

}  // namespace

const char* RunDropRows(const DropRows& work, Element type, void* stream) {
    return WithElement(type, [&](auto element) {
        return Launch(Drop<decltype(element)>, {work.batch * work.rows, 1, 1}, kThreads, 0, stream, work);
    });
}

}  // namespace elle_mp
