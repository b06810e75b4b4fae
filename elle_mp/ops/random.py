"""Counter-based random numbers: a value is a pure function of (seed, name, global index).

Initial weights are drawn here, so they are the same under every layout (DESIGN.md, section 4.2). The bits are those of
Philox4x32-10 (:mod:`elle_mp.ops.philox`); each of its counters makes four normal numbers, by the transform of Box and
Muller (1958). Sixteen counters make a block of 64 numbers: number ``16 k + l`` of a block is the ``k``-th of counter
``l`` of its own, which is the order in which vectors store them. ``csrc/ops/philox_runs.h`` computes in fp32, this
module in fp64: from the same bits, so the two differ by a few roundings. Each by itself gives the same bits however a
tensor is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from elle_mp.ops.library import compiled_ops
from elle_mp.ops.philox import philox, signed, stream_key

Bounds = tuple[tuple[int, int], ...]
"""Half-open range of global indices along each dimension."""

_TILE = 1 << 20
_COUNTERS = 16
_BLOCK = 4 * _COUNTERS
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def words(seed: int, name: str, start: int, count: int) -> npt.NDArray[np.uint64]:
    """Random 64-bit words number ``start`` to ``start + count`` of the stream ``(seed, name)``."""
    first = start // 2
    x0, x1, x2, x3 = _counters(stream_key(seed, name), first, (start + count + 1) // 2 - first)
    raw = np.stack((x0 | x1 << _HALF, x2 | x3 << _HALF), axis=1).reshape(-1)
    return raw[start - 2 * first :][:count]


def normal(seed: int, name: str, start: int, count: int) -> npt.NDArray[np.float64]:
    """Standard normal numbers ``start`` to ``start + count`` of the stream ``(seed, name)``."""
    first = start // _BLOCK
    blocks = (start + count + _BLOCK - 1) // _BLOCK - first
    x0, x1, x2, x3 = _counters(stream_key(seed, name), first * _COUNTERS, blocks * _COUNTERS)
    numbers = np.stack((*_pair(x0, x1), *_pair(x2, x3))).reshape(4, blocks, _COUNTERS).swapaxes(0, 1).reshape(-1)
    return numbers[start - first * _BLOCK :][:count]


def normal_block(seed: int, name: str, shape: Sequence[int], bounds: Bounds, dtype: torch.dtype) -> Tensor:
    """The block ``bounds`` of a standard normal tensor of global ``shape``, on the CPU.

    fp64, and everything without the compiled ops, is drawn in fp64 in tiles of about a million numbers.
    """
    sizes = [stop - start for start, stop in bounds]
    if prod(sizes) == 0:
        return torch.empty(sizes, dtype=dtype)
    if _KERNELS is None or dtype == torch.float64:
        return _drawn_in_tiles(seed, name, shape, bounds, dtype)
    block = torch.empty(sizes, dtype=torch.float32)
    fill_normal(block, stream_key(seed, name), shape, bounds)
    return block.to(dtype)


def fill_normal(block: Tensor, key: int, shape: Sequence[int], bounds: Bounds) -> None:
    """Fills a contiguous fp32 block with the compiled op."""
    # Dimensions behind the last one that is cut are part of its rows; those before the two last are gone through here.
    cut = max((dim for dim, bound in enumerate(bounds) if bound != (0, shape[dim])), default=0)
    inner = prod(shape[cut + 1 :])
    steps = [prod(shape[dim + 1 :]) for dim in range(len(shape))]
    outer = max(cut - 1, 0)
    rows = block.view(*block.shape[:outer], -1, (bounds[cut][1] - bounds[cut][0]) * inner)
    for place in product(*(range(size) for size in block.shape[:outer])):
        start = sum((bounds[dim][0] + (place[dim] if dim < outer else 0)) * steps[dim] for dim in range(len(shape)))
        _KERNELS.philox_normal(rows[place], signed(key), start, steps[cut - 1] if cut else 0)


def _drawn_in_tiles(seed: int, name: str, shape: Sequence[int], bounds: Bounds, dtype: torch.dtype) -> Tensor:
    """Whole rows are drawn and cut."""
    block = torch.empty([stop - start for start, stop in bounds], dtype=dtype)
    row = prod(shape[1:])
    rows_per_tile = max(1, _TILE // max(row, 1))
    inner = tuple(slice(start, stop) for start, stop in bounds[1:])
    first, last = bounds[0]
    for begin in range(first, last, rows_per_tile):
        end = min(last, begin + rows_per_tile)
        tile = torch.from_numpy(normal(seed, name, begin * row, (end - begin) * row)).view(end - begin, *shape[1:])
        block[begin - first : end - first] = tile[(slice(None), *inner)].to(dtype)
    return block


def _counters(key: int, first: int, count: int) -> tuple[npt.NDArray[np.uint64], ...]:
    """The four words of each counter, in uint64."""
    number = np.arange(first, first + count, dtype=np.uint64)
    zero = np.zeros_like(number)
    return philox((number & _LOW, number >> _HALF, zero, zero), key)


def _pair(
    radius_bits: npt.NDArray[np.uint64], angle_bits: npt.NDArray[np.uint64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Two normal numbers of two words."""
    radius = (radius_bits.astype(np.float64) + 0.5) * 2.0**-32
    np.log(radius, out=radius)
    radius *= -2.0
    np.sqrt(radius, out=radius)
    angle = (angle_bits.astype(np.float64) + 0.5) * (2.0 * np.pi * 2.0**-32)
    return radius * np.cos(angle), radius * np.sin(angle)


def _register() -> Any:
    """The compiled op, with its fake tensors, or ``None``."""
    ops = compiled_ops("philox_normal")
    if ops is None:
        return None

    @torch.library.register_fake("elle_mp::philox_normal")
    def _(out: Tensor, *others: Any) -> None:
        return None

    return ops


_KERNELS = _register()
