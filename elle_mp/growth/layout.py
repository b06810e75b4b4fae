"""Which parameters a layout can grow on the shards alone, and what moving the others costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from elle_mp.axes import ParamSpec
from elle_mp.growth.tensors import TensorGrowth
from elle_mp.ops.random import Bounds
from elle_mp.parallel.sharding import shard_bounds


@dataclass(frozen=True)
class Layout:
    """Sizes of the mesh axes that cut parameters."""

    tp: int = 1
    dp_shard: int = 1


@dataclass(frozen=True)
class OldParameters:
    """Declarations and global shapes of the old model's parameters."""

    specs: Mapping[str, ParamSpec]
    shapes: Mapping[str, tuple[int, ...]]


class Alignment:
    """Tells which old parameters every rank holds the needed part of; answers for layers alike are found once."""

    def __init__(self, old: OldParameters, layout: Layout) -> None:
        self.old = old
        self.layout = layout
        self._known: dict[tuple[object, ...], tuple[bool, ...]] = {}

    def recut(self, growth: TensorGrowth) -> tuple[str, ...]:
        """The old parameters that have to be gathered for this growth, the same on every rank."""
        if self.layout == Layout():
            return ()
        key = (growth.spec, growth.shape, tuple(id(item) for item in growth.dims), len(growth.reads), growth.treatment)
        if key not in self._known:
            self._known[key] = self._held(growth)
        return tuple(name for name, held in zip(growth.reads, self._known[key], strict=True) if not held)

    def _held(self, growth: TensorGrowth) -> tuple[bool, ...]:
        held = dict.fromkeys(growth.reads, True)
        for tp_rank in range(self.layout.tp):
            for dp_rank in range(self.layout.dp_shard):
                place = (tp_rank, self.layout.tp), (dp_rank, self.layout.dp_shard)
                needs = growth.needs(shard_bounds(growth.spec, growth.shape, *place))
                for name, needed in needs.items():
                    mine = shard_bounds(self.old.specs[name], self.old.shapes[name], *place)
                    held[name] = held[name] and inside(needed, mine)
        return tuple(held.values())


def inside(needed: Bounds, held: Bounds) -> bool:
    """Whether one block lies in another; an empty one lies anywhere."""
    if any(start == stop for start, stop in needed):
        return True
    return all(a >= c and b <= d for (a, b), (c, d) in zip(needed, held, strict=True))


def received_bytes(growths: Mapping[str, TensorGrowth], old: OldParameters, layout: Layout, entry: int = 4) -> int:
    """Bytes that each rank receives under a layout, weights and both moments, at ``entry`` bytes a number."""
    alignment = Alignment(old, layout)
    ranks = layout.tp * layout.dp_shard
    total = 0
    for growth in growths.values():
        for name in alignment.recut(growth):
            moments = 2 if name == growth.source and growth.moments != "reset" else 0
            share = ranks if old.specs[name].tensor_parallel_dim is not None else layout.dp_shard
            total += (1 + moments) * prod(old.shapes[name]) * entry * (share - 1) // share
    return total
