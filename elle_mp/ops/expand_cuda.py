"""Growth of one matrix on a GPU: what ``csrc/cuda/expand.cu`` must know, made ready on the CPU.

:mod:`elle_mp.ops.expand` says what is computed; the kernel gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elle_mp.ops.expand import MAX_COPIES, MEAN, NOISE_STD, RANDOM, Fresh, Index, Noise, fresh_factor, with_means
from elle_mp.ops.philox import signed

MOST_SHARED = 200 << 10
"""Bytes of shared memory for the noise of one row: a byte for each column, four for each group."""


@dataclass(frozen=True)
class NoisePlan:
    """Noise of the columns of a block.

    Attributes:
        group: int32 ``[C']``: which columns are copies of one unit.
        members: int32 ``[C']``: columns in the order of their groups.
        begin: int32 ``[groups + 1]``: where each group's begin among them.
        factor: fp64 ``[groups]``, what centred bits are multiplied by.
        silent: uint8 ``[R']``, 1 for rows without noise.
        key: 64 bits.
        alone: without the values that it is relative to.
    """

    group: Tensor
    members: Tensor
    begin: Tensor
    factor: Tensor
    silent: Tensor
    key: int
    alone: bool


@dataclass(frozen=True)
class FreshPlan:
    """Random values: codes of rows and columns (uint8), the columns' numbers among those that want them, factor."""

    rows: Tensor
    cols: Tensor
    ranks: Tensor
    key: int
    factor: float
    first_asked: int


def noise_plan(groups: Tensor, strength: float, bits_std: float, silent: Tensor, key: int, alone: bool) -> NoisePlan:
    """The plan for columns whose copies have one number in ``groups`` (int64 ``[C']``)."""
    _, group, count = torch.unique(groups, return_inverse=True, return_counts=True)
    begin = torch.zeros(len(count) + 1, dtype=torch.int32)
    begin[1:] = count.cumsum(0)
    spread = count.double() * bits_std
    # A number over a tensor would be the number times the reciprocals: two roundings.
    factor = torch.full_like(spread, strength) / spread
    members = group.argsort(stable=True).to(torch.int32)
    return NoisePlan(group.to(torch.int32), members, begin, factor, silent, key, alone)


def fits(plan: NoisePlan | None, first_col: int) -> bool:
    """Whether a block of threads has the memory for the noise of a row."""
    if plan is None:
        return True
    counters = (first_col % 16 + len(plan.group) + 15) // 16
    return 16 * counters + 16 * ((len(plan.factor) + 3) // 4) <= MOST_SHARED


def launch(
    ops: Any,
    source: Tensor,
    rows: Tensor,
    cols: Tensor,
    row_scale: Tensor | None,
    col_scale: Tensor | None,
    out: Tensor,
    noise: NoisePlan | None,
    fresh: FreshPlan | None,
    place: tuple[int, int],
) -> None:
    """Writes ``out`` by the kernel; ``rows`` and ``cols`` are indices into ``source``, on the CPU like the plans."""

    def there(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.contiguous().to(out.device, non_blocking=True)

    noisy: tuple[Any, ...] = (None, None, None, None, None, 0, False)
    if noise is not None:
        parts = noise.group, noise.members, noise.begin, noise.factor, noise.silent
        noisy = *map(there, parts), signed(noise.key), noise.alone
    random: tuple[Any, ...] = (None, None, None, 0, 0.0)
    if fresh is not None:
        random = *map(there, (fresh.rows, fresh.cols, fresh.ranks)), signed(fresh.key), fresh.factor
    ops.expand_block(
        *(source, there(rows), there(cols.to(torch.int32)), there(row_scale), there(col_scale), out),
        *noisy,
        *random,
        *(*place, 0 if fresh is None else fresh.first_asked),
    )


def write_by_kernel(
    ops: Any, source: Tensor, index: Index, out: Tensor, noise: Noise | None, fresh: Fresh | None
) -> bool:
    """Whether the CUDA kernel (``ops``: the library's) has written ``out``; it takes nearly all there is."""
    if out.numel() == 0:
        return True
    noisy, random, place = None, None, noise or fresh
    if noise is not None:
        silent = (index.rows == MEAN).to(torch.uint8)
        noisy = noise_plan(noise.groups, noise.strength, NOISE_STD, silent, noise.key, noise.alone)
        if int(noisy.begin.diff().max()) > MAX_COPIES or not fits(noisy, noise.first_col):
            return False
    if fresh is not None:
        ranks = (fresh.cols == RANDOM).cumsum(0, dtype=torch.int32) - 1
        random = FreshPlan(fresh.rows, fresh.cols, ranks, fresh.key, fresh_factor(fresh), fresh.first_asked)
    source, rows, cols = with_means(source, index)
    at = (0, 0) if place is None else (place.first_row, place.first_col)
    launch(ops, source, rows, cols, index.row_scale, index.col_scale, out, noisy, random, at)
    return True
