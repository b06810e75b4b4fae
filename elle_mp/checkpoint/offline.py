"""Grows a stored checkpoint block by block, without a model in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor

from elle_mp.axes import ParamSpec
from elle_mp.checkpoint.store import CheckpointStore
from elle_mp.checkpoint.stream_reader import StoredTensors
from elle_mp.errors import UserError
from elle_mp.growth.apply import grown_norm_stats
from elle_mp.growth.blocks import Block, grow_moment, grow_weight
from elle_mp.growth.maps import Fill
from elle_mp.growth.plan import GrowthPlan
from elle_mp.growth.tensors import DimGrowth, TensorGrowth, parameter_growths
from elle_mp.ops.random import Bounds

Stored = Mapping[str, tuple[tuple[int, ...], torch.dtype]]

MODEL, OPTIM, NORM_STATS = "model.", "optim.", "model.norm_stats"
DEGREES = {"exp_avg": 1, "exp_avg_sq": 2}
STEP = "step"


@dataclass(frozen=True)
class OfflineGrowth:
    """The tensors of a grown checkpoint, and how each block of them is made.

    Attributes:
        plan: of the growth.
        source: the old checkpoint's tensors.
        specs: declarations of the larger model's parameters.
    """

    plan: GrowthPlan
    source: StoredTensors
    specs: Mapping[str, ParamSpec]

    def __post_init__(self) -> None:
        object.__setattr__(self, "_growths", parameter_growths(self.plan, self.specs))

    @property
    def growths(self) -> dict[str, TensorGrowth]:
        """The growth of every parameter, by name."""
        growths: dict[str, TensorGrowth] = vars(self)["_growths"]
        return growths

    @property
    def longest_row(self) -> int:
        """Bytes of the longest row whose copies are noised together, the least that a block can be; 0 without noise."""
        rows = (item.shape[-1] for item in self.growths.values() if item.noise is not None)
        return max(rows, default=0) * self._dtype("token_table").itemsize

    def tensors(self) -> Stored:
        """Shape and type of every tensor of the new checkpoint, in the order of the model.

        Raises:
            UserError: the checkpoint lacks a tensor that the plan needs, or it has another shape.
        """
        out: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        optimizer = any(name.startswith(OPTIM) for name in self.source.tensors)
        master = self._dtype("token_table")
        for name, growth in self.growths.items():
            if growth.source is not None:
                self._check(MODEL + growth.source, growth.old_shape)
            out[MODEL + name] = (growth.shape, master)
        if self.plan.new.weighted_norms:
            out[NORM_STATS] = ((self.plan.new.embed,), torch.float64)
        for name, growth in self.growths.items() if optimizer else ():
            out[f"{OPTIM}{name}.{STEP}"] = ((), torch.float32)
            for moment in DEGREES:
                out[f"{OPTIM}{name}.{moment}"] = (growth.shape, master)
                if growth.source is not None and growth.moments != "reset":
                    self._check(f"{OPTIM}{growth.source}.{moment}", growth.old_shape)
        return out

    def produce(self, name: str, bounds: Bounds, old_bytes: int | None = None) -> Tensor:
        """A block of a tensor of the new checkpoint.

        Args:
            old_bytes: the most of the old tensors to be held at a time; a block that is made of more (a channel that
                holds a mean, a bias that takes over a norm's) is made in parts.
        """
        if name == NORM_STATS:
            return self._norm_stats()[bounds[0][0] : bounds[0][1]]
        if name.startswith(MODEL):
            growth = self.growths[name.removeprefix(MODEL)]
            return self._weight(growth, bounds, self._entries(old_bytes))
        parameter, _, moment = name.removeprefix(OPTIM).rpartition(".")
        growth = self.growths[parameter]
        fresh = growth.source is None or growth.moments == "reset"
        if moment == STEP:
            return torch.zeros(()) if fresh else self.source.read(f"{OPTIM}{growth.source}.{STEP}", ())
        if fresh:
            return self._empty(bounds).zero_()
        return self._moment(growth, moment, bounds, self._entries(old_bytes))

    def _weight(self, growth: TensorGrowth, bounds: Bounds, entries: int | None) -> Tensor:
        out = self._empty(bounds)
        for part in parts(growth, bounds, growth.reads, entries):
            blocks = {key: self._read(MODEL + key, needed) for key, needed in growth.needs(part).items()}
            grow_weight(growth, blocks, part, _place(out, bounds, part))
        return out

    def _moment(self, growth: TensorGrowth, moment: str, bounds: Bounds, entries: int | None) -> Tensor:
        source = growth.source or ""
        out = self._empty(bounds)
        for part in parts(growth, bounds, (source,), entries):
            block = self._read(f"{OPTIM}{source}.{moment}", growth.needs(part)[source])
            grow_moment(growth, block, part, _place(out, bounds, part), DEGREES[moment])
        return out

    def _entries(self, old_bytes: int | None) -> int | None:
        return None if old_bytes is None else old_bytes // self._dtype("token_table").itemsize

    def _empty(self, bounds: Bounds) -> Tensor:
        return torch.empty([stop - start for start, stop in bounds], dtype=self._dtype("token_table"))

    def _dtype(self, name: str) -> torch.dtype:
        if MODEL + name not in self.source.tensors:
            raise UserError(f"the checkpoint holds no tensor {MODEL}{name}")
        return self.source.tensors[MODEL + name][1]

    def _read(self, name: str, bounds: Bounds) -> Block:
        return Block(self.source.read(name, bounds), bounds)

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self.source.tensors:
            raise UserError(f"the checkpoint holds no tensor {name} {list(shape)}; is the plan of another model?")
        have = tuple(self.source.tensors[name][0])
        if have != shape:
            raise UserError(f"the checkpoint's tensor {name} is {list(have)}, and the plan starts from {list(shape)}")

    def _norm_stats(self) -> Tensor:
        old = self.plan.old.embed
        if NORM_STATS in self.source.tensors:
            weights = self.source.read(NORM_STATS, ((0, old),))
        else:
            weights = torch.full((old,), 1.0 / old, dtype=torch.float64)
        return grown_norm_stats(self.plan, weights)


def grow_checkpoint(
    growth: OfflineGrowth,
    store: CheckpointStore,
    name: str,
    meta: Mapping[str, Any],
    block_bytes: int,
    progress: Callable[[int], None],
) -> None:
    """Writes the grown checkpoint ``name`` into ``store``; collective over the default process group, or alone.

    Args:
        block_bytes: of the largest block that is in memory at a time, of the new tensors and of the old ones; at
            least a row of a matrix, whose copies are noised together. The same on all ranks.
        progress: called with the bytes just written.

    Raises:
        UserError: the old checkpoint does not fit the plan, or the new one cannot be written; nothing of it is left.
    """
    block_bytes = max(block_bytes, growth.longest_row)
    store.save_streamed(
        name,
        growth.tensors(),
        lambda tensor, bounds: growth.produce(tensor, bounds, block_bytes),
        meta,
        permanent=True,
        block_bytes=block_bytes,
        progress=progress,
    )


def parts(growth: TensorGrowth, bounds: Bounds, reads: tuple[str, ...], entries: int | None) -> Iterator[Bounds]:
    """Cuts a block of a new parameter until each part is made of at most ``entries`` old values, where that can be.

    Args:
        reads: the old parameters that are read for it.
        entries: ``None`` for no limit.
    """
    have = _needed(growth, bounds, reads)
    if entries is None or have <= entries:
        yield bounds
        return
    pieces = _runs(growth, bounds) or _best_cut(growth, bounds, reads, have) or ()
    for part in pieces:
        yield from parts(growth, part, reads, entries)
    if not pieces:
        yield bounds


def _runs(growth: TensorGrowth, bounds: Bounds) -> list[Bounds]:
    """Parts whose rows stand together in the old tensor, if the block's are scattered there (random maps, a table that
    begins anew behind its end): what lies between would be read in vain."""
    item, (start, stop) = growth.dims[0], bounds[0]
    if item is None or bool((item.fill[start:stop] == int(Fill.MEAN)).any()):
        return []
    first, last = item.source_range(start, stop)
    places = (item.item.index[start:stop].diff().abs() > 1).nonzero().flatten() + start + 1
    if last - first <= 2 * (stop - start) or not len(places):
        return []
    ends = [start, *places.tolist(), stop]
    return [((low, high), *bounds[1:]) for low, high in pairwise(ends)]


def _best_cut(growth: TensorGrowth, bounds: Bounds, reads: tuple[str, ...], have: int) -> tuple[Bounds, Bounds] | None:
    """Two halves, where it helps most, else where the next cut may: the copies of a head read the same."""
    cuts = [_cut(bounds, *place) for place in _places(growth, bounds)]
    costs = [[_needed(growth, part, reads) for part in cut] for cut in cuts]
    order = sorted(range(len(cuts)), key=lambda index: (max(costs[index]) >= have, sum(costs[index])))
    return cuts[order[0]] if order else None


def _needed(growth: TensorGrowth, bounds: Bounds, reads: tuple[str, ...]) -> int:
    needs = growth.needs(bounds)
    return sum(prod(stop - start for start, stop in needs[name]) for name in reads)


def _cut(bounds: Bounds, dim: int, place: int) -> tuple[Bounds, Bounds]:
    start, stop = bounds[dim]
    return (*bounds[:dim], (start, place), *bounds[dim + 1 :]), (*bounds[:dim], (place, stop), *bounds[dim + 1 :])


def _places(growth: TensorGrowth, bounds: Bounds) -> Iterator[tuple[int, int]]:
    """Where a block may be cut, nearest to its middle: dimension and global index."""
    for dim, (item, (start, stop)) in enumerate(zip(growth.dims, bounds, strict=True)):
        may = torch.ones(max(stop - start - 1, 0), dtype=torch.bool)
        if growth.noise is not None and dim == len(bounds) - 1 and item is not None:
            may = _between_units(item, start, stop)
        places = may.nonzero().flatten() + start + 1
        if len(places):
            yield dim, int(places[(places - (start + stop) // 2).abs().argmin()])


def _between_units(item: DimGrowth, start: int, stop: int) -> Tensor:
    """Whether a cut before each index but the first leaves all copies of each unit on one side (bool)."""
    copied = item.fill[start:stop] == int(Fill.COPY)
    index = item.item.index[start:stop]
    highest = torch.where(copied, index, -1).cummax(0).values
    lowest = torch.where(copied, index, item.item.old).flip(0).cummin(0).values.flip(0)
    return highest[:-1] < lowest[1:]


def _place(out: Tensor, bounds: Bounds, part: Bounds) -> Tensor:
    """The part of a block's tensor."""
    return out[tuple(slice(low - start, high - start) for (low, high), (start, _) in zip(part, bounds, strict=True))]
