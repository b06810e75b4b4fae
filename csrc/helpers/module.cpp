// The Python module elle_mp._helpers: NumPy in and out, no torch.

#include <pybind11/pybind11.h>

namespace elle_mp {
void register_activations(pybind11::module_& m);
void register_data(pybind11::module_& m);
void register_dropout(pybind11::module_& m);
void register_expand(pybind11::module_& m);
}  // namespace elle_mp

PYBIND11_MODULE(_helpers, m) {
    m.doc() = "Compiled twins of NumPy and PyTorch code in elle_mp.";
    elle_mp::register_activations(m);
    elle_mp::register_data(m);
    elle_mp::register_dropout(m);
    elle_mp::register_expand(m);
}
