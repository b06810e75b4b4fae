"""What each rank holds of the tensors of a checkpoint, and which rank writes what."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from elle_mp.errors import UserError
from elle_mp.ops.random import Bounds
from elle_mp.parallel.sharding import local_tensor

_PIECE_COST = 64 << 10  # bytes that take as long to write as a piece takes to start


@dataclass(frozen=True)
class Blocks:
    """A tensor of which this rank holds some blocks, where no mesh says which (ZeRO's flat partitions).

    Attributes:
        shape: of the whole tensor.
        blocks: values by the block's first index in the whole tensor. Ranks that hold the same block hold it whole.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: Mapping[tuple[int, ...], Tensor]


Held = Mapping[str, Tensor | Blocks]
"""DTensors, :class:`Blocks`, and plain tensors that are equal on all ranks, by name."""


@dataclass(frozen=True)
class Piece:
    """A block that this rank holds; ``values`` shares its memory with the tensor's."""

    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    values: Tensor

    @property
    def bounds(self) -> Bounds:
        """Half-open, per dimension of the whole tensor."""
        return tuple((start, start + size) for start, size in zip(self.offsets, self.values.shape, strict=True))

    @property
    def place(self) -> Place:
        """What the other ranks need to know of it."""
        return Place(self.name, self.shape, self.values.dtype, self.offsets, tuple(self.values.shape))


@dataclass(frozen=True)
class Place:
    """Where a block lies in which tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def cost(self) -> int:
        """Of writing it, in bytes."""
        return prod(self.sizes) * self.dtype.itemsize + _PIECE_COST


def pieces_of(tensors: Held) -> list[Piece]:
    """The blocks that this rank holds; none of a tensor of which it holds nothing.

    A tensor without entries is one block.
    """
    known: dict[object, tuple[int, ...]] = {}
    found = []
    for name, item in tensors.items():
        shape = tuple(item.shape)
        if isinstance(item, Blocks):
            blocks = dict(item.blocks)
        elif isinstance(item, DTensor):
            local = local_tensor(item).detach()
            # Asked for three times for each parameter (the weight and Adam's two moments), and slow to compute.
            key = (item.device_mesh, item.placements, shape)
            if key not in known:
                known[key] = tuple(compute_local_shape_and_global_offset(shape, item.device_mesh, item.placements)[1])
            blocks = {known[key]: local}
        else:
            blocks = {(0,) * len(shape): item.detach()}
        if prod(shape) == 0:
            blocks = {(0,) * len(shape): value.reshape(shape) for value in list(blocks.values())[:1]}
            found += [Piece(name, shape, offsets, value) for offsets, value in blocks.items()]
        else:
            found += [Piece(name, shape, offsets, value) for offsets, value in blocks.items() if value.numel()]
    return found


@dataclass(frozen=True)
class Plan:
    """What one rank writes.

    Attributes:
        held: the blocks that the rank holds, for which the plan was made.
        written: indices of those that it writes.
        everything: the blocks of every tensor by its name; on rank 0 only.
    """

    held: list[Place]
    written: list[int]
    everything: Mapping[str, list[Place]]


def share_out(held: Sequence[list[Place]]) -> tuple[list[list[int]], dict[str, list[Place]]]:
    """Has every block written once, by a rank that holds it, and the ranks write about as much as each other.

    Args:
        held: by each rank.

    Returns:
        For each rank the indices of those that it writes, and the blocks of every tensor by its name.

    Raises:
        UserError: ranks do not agree on a tensor, or its blocks do not make up the whole of it.
    """
    holders: dict[tuple[str, tuple[int, ...]], list[int]] = defaultdict(list)
    places: dict[tuple[str, tuple[int, ...]], Place] = {}
    for rank, mine in enumerate(held):
        for place in mine:
            key = (place.name, place.offsets)
            if places.setdefault(key, place) != place:
                raise UserError(f"ranks hold different blocks of tensor {place.name} at {list(place.offsets)}")
            holders[key].append(rank)
    load = [0] * len(held)
    writer: dict[tuple[str, tuple[int, ...]], int] = {}
    # Those that only one rank can write first, then the largest: the small ones even out what is left.
    for key in sorted(holders, key=lambda key: (len(holders[key]) > 1, -places[key].cost)):
        writer[key] = min(holders[key], key=lambda rank: load[rank])
        load[writer[key]] += places[key].cost
    everything: dict[str, list[Place]] = defaultdict(list)
    for place in places.values():
        everything[place.name].append(place)
    for name, blocks in everything.items():
        _check_whole(name, blocks)
    written = [
        [index for index, place in enumerate(mine) if writer[place.name, place.offsets] == rank]
        for rank, mine in enumerate(held)
    ]
    return written, dict(everything)


def _check_whole(name: str, blocks: list[Place]) -> None:
    first = blocks[0]
    if any((place.shape, place.dtype) != (first.shape, first.dtype) for place in blocks):
        raise UserError(f"ranks hold tensor {name} in different shapes or kinds of numbers")
    if sum(prod(place.sizes) for place in blocks) != prod(first.shape):
        raise UserError(f"the ranks' blocks of tensor {name} {list(first.shape)} do not make up the whole of it")


def check_fit(
    stored: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    wanted: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    everywhere: set[str] | None,
) -> None:
    """Compares what a checkpoint holds with what is to be filled.

    Args:
        wanted: this rank's tensors: global shape and dtype by name.
        everywhere: the names that any rank wants (pipeline stages want different ones); ``None`` to leave alone
            what nobody wants.

    Raises:
        UserError: a tensor is missing, is left over, or has another shape or kind of number; names the first.
    """
    for name, (shape, dtype) in wanted.items():
        if name not in stored:
            raise UserError(f"it holds no tensor {name} {list(shape)}")
        have, have_dtype = stored[name]
        if tuple(have) != tuple(shape):
            raise UserError(f"its tensor {name} is {list(have)}, this model's is {list(shape)}")
        if have_dtype != dtype and not (have_dtype.is_floating_point and dtype.is_floating_point):
            raise UserError(f"its tensor {name} is {have_dtype}, this model's is {dtype}")
    extra = [] if everywhere is None else [name for name in stored if name not in everywhere]
    if extra:
        more = f" (nor {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise UserError(f"this model has no tensor {extra[0]} {list(stored[extra[0]][0])}{more}")
