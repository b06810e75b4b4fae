#include "expand.h"

#include <algorithm>

#include "binding.h"

namespace elle_mp {
namespace {

// The data of a tensor that may be missing.
template <typename T>
const T* Optional(const std::optional<Tensor>& x, const Tensor& like, ScalarType type, int64_t numel,
                  const char* name) {
    if (!x) return nullptr;
    CheckFits(*x, like, type, numel, name);
    return DataOf<const T>(*x);
}

// elle_mp/ops/expand_cuda.py makes the arguments; indices are not looked at here.
void ExpandBlock(Tensor source, Tensor rows, Tensor cols, std::optional<Tensor> row_scale,
                 std::optional<Tensor> col_scale, Tensor out, std::optional<Tensor> group,
                 std::optional<Tensor> members, std::optional<Tensor> begin, std::optional<Tensor> factor,
                 std::optional<Tensor> silent, int64_t noise_key, bool alone,
                 std::optional<Tensor> fresh_rows, std::optional<Tensor> fresh_cols,
                 std::optional<Tensor> ranks, int64_t fresh_key, double fresh_factor, int64_t first_row,
                 int64_t first_col, int64_t first_asked) {
    const Device device(out);
    const Element type = ElementOf(out, "expand");
    STD_TORCH_CHECK(type == Element::kFloat || type == Element::kDouble,
                    "expand has kernels for fp32 and fp64");
    STD_TORCH_CHECK(source.dim() == 2 && out.dim() == 2 && source.scalar_type() == out.scalar_type() &&
                        source.is_cpu() == out.is_cpu() && out.size(1) < (1 << 30) &&
                        source.size(1) < (1 << 30),
                    "source and out do not fit");
    STD_TORCH_CHECK(
        (source.size(1) <= 1 || source.stride(1) == 1) && (out.size(1) <= 1 || out.stride(1) == 1),
        "expand wants contiguous columns");
    STD_TORCH_CHECK(!group == !members && !group == !begin && !group == !factor && !group == !silent,
                    "noise wants all of its tensors");
    STD_TORCH_CHECK(!fresh_rows == !fresh_cols && !fresh_rows == !ranks,
                    "random values want all of their tensors");
    const int64_t height = out.size(0), width = out.size(1), groups = factor ? factor->numel() : 0;
    CheckFits(rows, out, ScalarType::Long, height, "rows");
    CheckFits(cols, out, ScalarType::Int, width, "cols");
    Expand work{};
    work.source = source.data_ptr();
    work.out = out.data_ptr();
    work.source_stride = source.stride(0);
    work.out_stride = out.stride(0);
    work.height = height;
    work.width = static_cast<int>(width);
    work.rows = DataOf<const int64_t>(rows);
    work.cols = DataOf<const int32_t>(cols);
    work.row_scale = Optional<double>(row_scale, out, ScalarType::Double, height, "row_scale");
    work.col_scale = Optional<double>(col_scale, out, ScalarType::Double, width, "col_scale");
    work.group = Optional<int32_t>(group, out, ScalarType::Int, width, "group");
    work.members = Optional<int32_t>(members, out, ScalarType::Int, width, "members");
    work.begin = Optional<int32_t>(begin, out, ScalarType::Int, groups + 1, "begin");
    work.factor = Optional<double>(factor, out, ScalarType::Double, groups, "factor");
    work.silent = Optional<uint8_t>(silent, out, ScalarType::Byte, height, "silent");
    work.groups = static_cast<int>(groups);
    work.noise_key = static_cast<uint64_t>(noise_key);
    work.alone = alone;
    work.fresh_rows = Optional<uint8_t>(fresh_rows, out, ScalarType::Byte, height, "fresh_rows");
    work.fresh_cols = Optional<uint8_t>(fresh_cols, out, ScalarType::Byte, width, "fresh_cols");
    work.ranks = Optional<int32_t>(ranks, out, ScalarType::Int, width, "ranks");
    work.fresh_key = static_cast<uint64_t>(fresh_key);
    work.fresh_factor = fresh_factor;
    work.first_row = first_row;
    work.first_col = first_col;
    work.first_asked = first_asked;
    const int64_t each = work.RowShared();
    STD_TORCH_CHECK(each <= kMostShared, "expand: too many columns for one block's memory");
    work.rows_in_block =
        static_cast<int>(std::clamp<int64_t>(each ? kUsualShared / each : kMostRows, 1, kMostRows));
    if (height > 0 && width > 0) Check(RunExpand(work, type, device.stream()));
}

}  // namespace
}  // namespace elle_mp

STABLE_TORCH_LIBRARY_FRAGMENT(ELLE_LIBRARY, m) {
    m.def(
        "expand_block(Tensor source, Tensor rows, Tensor cols, Tensor? row_scale, Tensor? col_scale, "
        "Tensor(a!) out, Tensor? group, Tensor? members, Tensor? begin, Tensor? factor, Tensor? silent, "
        "int noise_key, bool alone, Tensor? fresh_rows, Tensor? fresh_cols, Tensor? ranks, int fresh_key, "
        "float fresh_factor, int first_row, int first_col, int first_asked) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ELLE_LIBRARY, ELLE_KEY, m) {
    m.impl("expand_block", TORCH_BOX(&elle_mp::ExpandBlock));
}
