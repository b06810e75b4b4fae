"""The library of compiled torch ops, ``elle_mp/_ops.so``, where it was built (``csrc/ops``).

It has no Python in it: torch loads it, and its ops are ``torch.ops.elle_mp.*``. Without it every op runs on its
PyTorch reference.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

LIBRARY = Path(__file__).resolve().parents[1] / "_ops.so"


@cache
def what_is_wrong() -> str | None:
    """``None`` when the library is loaded, else why not, in a few words."""
    if not LIBRARY.exists():
        return "not built"
    try:
        torch.ops.load_library(LIBRARY)
    except (OSError, RuntimeError) as error:
        return f"built, but does not load: {(str(error).splitlines() or [type(error).__name__])[0]}"
    return None


def compiled_ops(*names: str) -> Any:
    """``torch.ops.elle_mp`` if it has ops ``names`` (an older build may not), else ``None``."""
    if what_is_wrong() is not None or not all(hasattr(torch.ops.elle_mp, name) for name in names):
        return None
    return torch.ops.elle_mp


def instructions() -> str | None:
    """The instruction level that the ops run at (``avx512_bf16``, ``avx512``, ``avx2``, ``plain``), if they are there.

    The environment variable ``ELLE_MP_INSTRUCTIONS`` names a lower one than the machine's best.
    """
    ops = compiled_ops("instructions")
    return None if ops is None else str(ops.instructions())
