"""Parts of tensors that are cut anywhere in their flattened form, as boxes that checkpoints and growth can take.

ZeRO cuts the concatenation of all parameters, so a rank's part of one parameter is a run of its entries in memory
order: at most ``2 N - 1`` boxes of an ``N``-dimensional tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from elle_mp.ops.random import Bounds


@dataclass(frozen=True)
class Piece:
    """A box of a tensor.

    Attributes:
        bounds: half-open, per dimension, in the whole tensor.
        values: of the box's shape; a view of whatever holds it.
    """

    bounds: Bounds
    values: Tensor


def boxes(shape: Sequence[int], start: int, stop: int) -> list[Bounds]:
    """The entries ``[start, stop)`` of a tensor in memory order, as boxes in that order."""
    if start >= stop:
        return []
    if len(shape) == 1:
        return [((start, stop),)]
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row

    def part(index: int, begin: int, end: int) -> list[Bounds]:
        return [((index, index + 1), *rest) for rest in boxes(shape[1:], begin, end)]

    if first > last:
        return part(last, start - last * row, stop - last * row)
    out = part(first - 1, start - (first - 1) * row, row) if start < first * row else []
    if first < last:
        out.append(((first, last), *((0, size) for size in shape[1:])))
    return out + part(last, 0, stop - last * row)


def pieces_of(flat: Tensor, local: Bounds, start: int) -> list[Piece]:
    """The pieces that a run of entries makes.

    Args:
        flat: the run ``[start, start + len(flat))`` of the entries of this rank's block of a tensor.
        local: where that block lies in the whole tensor.
    """
    out, offset = [], 0
    for box in boxes([stop - begin for begin, stop in local], start, start + flat.numel()):
        sizes = [stop - begin for begin, stop in box]
        bounds = tuple((low + begin, low + stop) for (low, _), (begin, stop) in zip(local, box, strict=True))
        out.append(Piece(bounds, flat.narrow(0, offset, prod(sizes)).view(sizes)))
        offset += prod(sizes)
    return out


def block_of(pieces: Iterable[Piece], local: Bounds, like: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The block ``local`` of a tensor, of which every rank of ``group`` holds other pieces. Collective.

    Args:
        like: gives dtype and device.
    """
    block = torch.zeros([stop - start for start, stop in local], dtype=like.dtype, device=like.device)
    for piece in pieces:
        _within(block, local, piece.bounds).copy_(piece.values)
    if dist.get_world_size(group) > 1:
        dist.all_reduce(block, group=group)
    return block


def take(block: Tensor, local: Bounds, pieces: Iterable[Piece]) -> None:
    """Fills pieces from the block ``local`` that contains them."""
    for piece in pieces:
        piece.values.copy_(_within(block, local, piece.bounds))


def _within(block: Tensor, local: Bounds, bounds: Bounds) -> Tensor:
    for dim, ((low, _), (start, stop)) in enumerate(zip(local, bounds, strict=True)):
        block = block.narrow(dim, start - low, stop - start)
    return block
