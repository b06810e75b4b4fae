"""NVIDIA's apex, where it is really there: its fused kernels in place of torch's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elle_mp.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

HOW = "build NVIDIA/apex from source with --cpp_ext and --cuda_ext"
UNRELATED = "an unrelated package, not NVIDIA's"
MARKS = ("multi_tensor_apply", "normalization/fused_layer_norm.py")
"""Files that tell it from the registry's package of that name, which is a web toolkit."""


@dataclass(frozen=True)
class Apex:
    """What is taken from apex.

    Attributes:
        adam: ``amp_C.multi_tensor_adam``, to be called through ``apply``.
        apply: ``apex.multi_tensor_apply.multi_tensor_applier``.
        layer_norm: ``(x, weight, bias, shape, eps)``.
        rms_norm: ``(x, weight, shape, eps)``.
    """

    adam: Any
    apply: Callable[..., Any]
    layer_norm: Callable[..., Tensor]
    rms_norm: Callable[..., Tensor]


def what_is_wrong() -> str | None:
    """Why apex cannot be used, or ``None``. Nothing is imported: a stranger's package is judged by its files alone."""
    spec = find_spec("apex")
    if spec is None:
        return "not installed"
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    if not any((folder / mark).exists() for folder in folders for mark in MARKS):
        return UNRELATED
    if find_spec("amp_C") is None or find_spec("fused_layer_norm_cuda") is None:
        return "NVIDIA's, without its CUDA kernels"
    return None


def load_apex() -> Apex:
    """Apex with its kernels.

    Raises:
        UserError: it is not there, is another package, or was built without kernels.
    """
    if wrong := what_is_wrong():
        raise UserError(f"parallel.apex=true, but apex is {wrong}; {HOW}, or leave parallel.apex out")
    norms = import_module("apex.normalization.fused_layer_norm")
    return Apex(
        adam=import_module("amp_C").multi_tensor_adam,
        apply=import_module("apex.multi_tensor_apply").multi_tensor_applier,
        layer_norm=norms.fused_layer_norm_affine,
        rms_norm=norms.fused_rms_norm_affine,
    )
