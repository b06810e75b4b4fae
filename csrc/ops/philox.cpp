#include "philox.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>

#include "levels.h"

namespace elle_mp {
namespace {

// Numbers that are worth another thread, and that a row of no gaps is cut into: whole blocks.
constexpr int64_t kPiece = 1 << 14;

}  // namespace

void PhiloxNormal(torch::stable::Tensor out, int64_t key, int64_t start, int64_t stride) {
    STD_TORCH_CHECK(
        out.is_cpu() && out.scalar_type() == torch::headeronly::ScalarType::Float && out.dim() == 2,
        "philox_normal fills fp32 [R, C] on the CPU");
    STD_TORCH_CHECK(out.size(1) <= 1 || out.stride(1) == 1, "philox_normal wants contiguous columns");
    STD_TORCH_CHECK(start >= 0 && stride >= 0, "philox_normal counts from 0 upwards");
    const int64_t rows = out.size(0), columns = out.size(1), row = out.stride(0);
    if (rows == 0 || columns == 0) return;
    const auto run = Level().normal_run;
    const auto stream = static_cast<uint64_t>(key);
    auto* to = static_cast<float*>(out.data_ptr());
    if (rows == 1 || (row == columns && stride == columns)) {
        const int64_t count = rows * columns;
        torch::stable::parallel_for(0, (count + kPiece - 1) / kPiece, 1, [&](int64_t begin, int64_t end) {
            const int64_t first = begin * kPiece;
            run(stream, static_cast<uint64_t>(start + first), std::min(count, end * kPiece) - first,
                to + first);
        });
        return;
    }
    const int64_t grain = std::max<int64_t>(1, kPiece / columns);
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            run(stream, static_cast<uint64_t>(start + i * stride), columns, to + i * row);
    });
}

}  // namespace elle_mp
