// Counter-based dropout of rows.
#include "binding.h"
#include "masks.cuh"

namespace elle_mp {
namespace {

constexpr int kThreads = 256;

// A thread takes pairs of columns (one word of the mask each); a block the pairs of one row, in strides.
template <typename T>
ELLE_KERNEL(kThreads)
DropRows(const T* x, T* out, const int64_t* keys, int64_t rows, int64_t columns, int64_t first_row,
         uint32_t threshold, Wide<T> scale) {
    const int64_t row = BlockX();
    const MaskKey key = RowKey(keys[row / rows], first_row + row % rows);
    x += row * columns;
    out += row * columns;
    for (int64_t pair = ThreadIndex(); 2 * pair < columns; pair += BlockSize()) {
        const uint32_t word = MaskWord(key, static_cast<uint32_t>(pair));
        for (int64_t c = 2 * pair; c < 2 * pair + 2 && c < columns; ++c)
            out[c] = Narrow<T>(Kept(word, c, threshold) ? ToFloat(x[c]) * scale : Wide<T>(0));
    }
}

// x [B, rows, columns], keys int64 [B] -> the same with elements dropped and the others scaled.
Tensor DropoutRows(Tensor x, Tensor keys, int64_t first_row, int64_t threshold) {
    STD_TORCH_CHECK(x.dim() == 3, "dropout wants x [B, S, D]");
    STD_TORCH_CHECK(threshold >= 0 && threshold < 65536, "the threshold is not one of 65536 levels");
    const Device device(x);
    CheckFits(keys, x, ScalarType::Long, x.size(0), "keys");
    const Tensor in = torch::stable::contiguous(x);
    const Tensor out = EmptyOf(x, SizesOf(x), x.scalar_type());
    const double scale = 65536.0 / (65536.0 - static_cast<double>(threshold));
    if (x.numel() == 0) return out;
    WithType(x.scalar_type(), "dropout", [&](auto element) {
        typedef decltype(element) T;
        RunKernel(device, DropRows<T>, {x.size(0) * x.size(1), 1, 1}, kThreads, 0, DataOf<const T>(in),
                  DataOf<T>(out), DataOf<const int64_t>(keys), x.size(1), x.size(2), first_row,
                  static_cast<uint32_t>(threshold), static_cast<Wide<T>>(scale));
    });
    return out;
}

}  // namespace
}  // namespace elle_mp

STABLE_TORCH_LIBRARY_FRAGMENT(ELLE_LIBRARY, m) {
    m.def("dropout_rows(Tensor x, Tensor keys, int first_row, int threshold) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ELLE_LIBRARY, ELLE_KEY, m) {
    m.impl("dropout_rows", TORCH_BOX(&elle_mp::DropoutRows));
}
