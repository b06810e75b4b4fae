#include "embedding.h"

#include "binding.h"

namespace elle_mp {
namespace {

// grad [n, D]; ids int64 [n], ascending, and order [n], which rows of grad they are of -> [rows, D].
Tensor EmbeddingGradient(Tensor grad, Tensor ids, Tensor order, int64_t rows) {
    const Device device(grad);
    STD_TORCH_CHECK(grad.dim() == 2 && grad.is_contiguous() && rows >= 0, "grad must be [n, D], contiguous");
    TableGradient work{};
    work.count = grad.size(0);
    work.rows = rows;
    work.columns = grad.size(1);
    CheckFits(ids, grad, ScalarType::Long, work.count, "ids");
    CheckFits(order, grad, ScalarType::Long, work.count, "order");
    const Tensor out = EmptyOf(grad, {rows, work.columns}, grad.scalar_type());
    work.grad = grad.data_ptr();
    work.out = out.data_ptr();
    work.ids = DataOf<const int64_t>(ids);
    work.order = DataOf<const int64_t>(order);
    const Element type = ElementOf(grad, "embedding_gradient");
    const int64_t size = type == Element::kDouble ? 8 : type == Element::kFloat ? 4 : 2;
    const auto address =
        reinterpret_cast<std::uintptr_t>(work.grad) | reinterpret_cast<std::uintptr_t>(work.out);
    work.aligned = address % 16 == 0 && work.columns * size % 16 == 0;
    Check(RunTableGradient(work, type, device.stream()));
    return out;
}

}  // namespace
}  // namespace elle_mp

STABLE_TORCH_LIBRARY_FRAGMENT(ELLE_LIBRARY, m) {
    m.def("embedding_gradient(Tensor grad, Tensor ids, Tensor order, int rows) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ELLE_LIBRARY, ELLE_KEY, m) {
    m.impl("embedding_gradient", TORCH_BOX(&elle_mp::EmbeddingGradient));
}
