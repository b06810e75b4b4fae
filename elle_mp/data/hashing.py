"""Counter-based hashing: what sample order, memories and masks are derived from.

``csrc/helpers/hashing.h`` is the compiled twin of :func:`mix64`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
SECOND = np.uint64(0xD1B54A32D192ED03)


def mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): a bijection of 64-bit words."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def derive_key(*parts: int | str) -> int:
    """A 64-bit key that names ``parts``: the same on every machine, and different for different parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


@functools.cache
def compiled_helpers() -> ModuleType | None:
    """The extension ``elle_mp._helpers``, or None where it was not built."""
    try:
        return importlib.import_module("elle_mp._helpers")
    except ImportError:
        return None
