"""The compiled helpers, where they were built."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def helpers(name: str) -> ModuleType | None:
    """The extension, if it was built and has ``name`` (an older build may not); else ``None``."""
    try:
        module = import_module("elle_mp._helpers")
    except ImportError:
        return None
    return module if hasattr(module, name) else None


def as_array(x: Tensor) -> npt.NDArray[np.generic]:
    """The memory of a CPU tensor as an array of its shape and strides; bfloat16 as its 16 bits (uint16)."""
    x = x.detach()
    array: npt.NDArray[np.generic]
    if x.dtype == torch.bfloat16:
        array = x.view(torch.int16).numpy().view(np.uint16)
    else:
        array = x.numpy()
    return array
