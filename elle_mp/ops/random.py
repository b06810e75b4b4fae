"""Counter-based random numbers: a value is a pure function of (seed, name, global index).

Initial weights and growth noise are drawn here, so they are the same under every layout (DESIGN.md, section 4.2).
The generator is Philox4x64-10 (Salmon et al., SC'11) as NumPy implements it; the transform to normal values takes
one 64-bit word each, so that element ``i`` can be computed without its neighbours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from math import prod

import numpy as np
import numpy.typing as npt
import torch

Bounds = tuple[tuple[int, int], ...]
"""Half-open range of global indices along each dimension."""

_TILE = 1 << 20
_WORDS_PER_COUNTER = 4


def words(seed: int, name: str, start: int, count: int) -> npt.NDArray[np.uint64]:
    """Random 64-bit words number ``start`` to ``start + count`` of the stream ``(seed, name)``."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
    first, skip = divmod(start, _WORDS_PER_COUNTER)
    generator = np.random.Philox(key=int.from_bytes(digest, "little"), counter=first)
    raw: npt.NDArray[np.uint64] = generator.random_raw(skip + count)
    return raw[skip:]


def normal(seed: int, name: str, start: int, count: int) -> npt.NDArray[np.float64]:
    """Standard normal values number ``start`` to ``start + count``: Box-Muller on the halves of one word each."""
    raw = words(seed, name, start, count)
    radius = ((raw >> np.uint64(32)).astype(np.float64) + 0.5) * 2.0**-32
    angle = ((raw & np.uint64(0xFFFFFFFF)).astype(np.float64) + 0.5) * (2.0 * np.pi * 2.0**-32)
    np.log(radius, out=radius)
    radius *= -2.0
    np.sqrt(radius, out=radius)
    np.cos(angle, out=angle)
    radius *= angle
    return radius


def normal_block(seed: int, name: str, shape: Sequence[int], bounds: Bounds, dtype: torch.dtype) -> torch.Tensor:
    """The block ``bounds`` of a standard normal tensor of global ``shape``.

    Whole rows are drawn in tiles of about a million values and cut, so memory stays bounded by the block.
    """
    block = torch.empty([stop - start for start, stop in bounds], dtype=dtype)
    if block.numel() == 0:
        return block
    row = prod(shape[1:])
    rows_per_tile = max(1, _TILE // max(row, 1))
    inner = tuple(slice(start, stop) for start, stop in bounds[1:])
    first, last = bounds[0]
    for begin in range(first, last, rows_per_tile):
        end = min(last, begin + rows_per_tile)
        tile = torch.from_numpy(normal(seed, name, begin * row, (end - begin) * row)).view(end - begin, *shape[1:])
        block[begin - first : end - first] = tile[(slice(None), *inner)].to(dtype)
    return block
