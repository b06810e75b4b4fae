"""The libraries of compiled torch ops, where they were built: ``elle_mp/_ops.so`` (``csrc/ops``) with the ops and
their kernels for the CPU, and ``elle_mp/_cuda_ops.so`` (``csrc/cuda``) with kernels for GPUs.

They have no Python in them: torch loads them, and their ops are ``torch.ops.elle_mp.*``. Without them every op runs on
its PyTorch reference.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

LIBRARY = Path(__file__).resolve().parents[1] / "_ops.so"
CUDA_LIBRARY = LIBRARY.with_name("_cuda_ops.so")


@cache
def what_is_wrong() -> str | None:
    """``None`` when the library is loaded, else why not, in a few words."""
    return _load(LIBRARY)


@cache
def what_is_wrong_with_cuda() -> str | None:
    """:func:`what_is_wrong` of the CUDA library, which is loaded by the first call, and only where a GPU is."""
    if not CUDA_LIBRARY.exists():
        return "not built"
    if not torch.cuda.is_available():
        return "built, but not loaded: no GPU here"
    if what_is_wrong() is not None:
        return "built, but not loaded: the ops are not there"
    wrong = _load(CUDA_LIBRARY)
    if wrong is None:
        register_cuda_fakes("elle_mp")
    return wrong


def register_cuda_fakes(namespace: str) -> None:
    """Fake tensors of the ops that only the CUDA library has; the others' are with their faces."""

    @torch.library.register_fake(f"{namespace}::dropout_rows")
    def _(x: torch.Tensor, *others: Any) -> torch.Tensor:
        return x.new_empty(x.shape)

    @torch.library.register_fake(f"{namespace}::embedding_gradient")
    def _(grad: torch.Tensor, ids: torch.Tensor, order: torch.Tensor, rows: int) -> torch.Tensor:
        return grad.new_empty(rows, grad.shape[1])

    @torch.library.register_fake(f"{namespace}::expand_block")
    def _(*others: Any) -> None:
        return None


def _load(library: Path) -> str | None:
    if not library.exists():
        return "not built"
    try:
        torch.ops.load_library(library)
    except (OSError, RuntimeError) as error:
        return f"built, but does not load: {(str(error).splitlines() or [type(error).__name__])[0]}"
    return None


def compiled_ops(*names: str) -> Any:
    """``torch.ops.elle_mp`` if it has ops ``names`` (an older build may not), else ``None``."""
    if what_is_wrong() is not None or not all(hasattr(torch.ops.elle_mp, name) for name in names):
        return None
    return torch.ops.elle_mp


def cuda_ops(*names: str) -> Any:
    """``torch.ops.elle_mp`` if the CUDA library is loaded and it has ops ``names``, else ``None``."""
    return None if what_is_wrong_with_cuda() is not None else compiled_ops(*names)


def instructions() -> str | None:
    """The instruction level that the ops run at (``avx512_bf16``, ``avx512``, ``avx2``, ``plain``), if they are there.

    The environment variable ``ELLE_MP_INSTRUCTIONS`` names a lower one than the machine's best.
    """
    ops = compiled_ops("instructions")
    return None if ops is None else str(ops.instructions())
