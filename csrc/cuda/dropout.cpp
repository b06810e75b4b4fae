#include "dropout.h"

#include "binding.h"

namespace elle_mp {
namespace {

// x [B, rows, columns], keys int64 [B] -> the same with elements dropped and the others scaled.
Tensor DropoutRows(Tensor x, Tensor keys, int64_t first_row, int64_t threshold) {
    STD_TORCH_CHECK(x.dim() == 3, "dropout wants x [B, S, D]");
    STD_TORCH_CHECK(threshold >= 0 && threshold < 65536, "the threshold is not one of 65536 levels");
    const Device device(x);
    CheckFits(keys, x, ScalarType::Long, x.size(0), "keys");
    const Tensor in = torch::stable::contiguous(x);
    const Tensor out = EmptyOf(x, SizesOf(x), x.scalar_type());
    if (x.numel() == 0) return out;
    const double scale = 65536.0 / (65536.0 - static_cast<double>(threshold));
    const DropRows work{in.data_ptr(), out.data_ptr(), DataOf<const int64_t>(keys),      x.size(0), x.size(1),
                        x.size(2),     first_row,      static_cast<uint32_t>(threshold), scale};
    Check(RunDropRows(work, ElementOf(x, "dropout"), device.stream()));
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
