"""Index maps of axes: what each new unit is made of (growth.md, sections 0 to 2)."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elle_mp.axes import Axis, Dim


class Fill(IntEnum):
    """What stands at a unit. Of several dimensions the largest wins: an entry is zero if one of them says so."""

    COPY = 0
    """The source's value, scaled."""
    TILE = 1
    """The source's value in a unit of its own: not used yet, so Adam starts anew (a position beyond the old ones)."""
    NEXT = 2
    """The value of the same place one layer above (AKI)."""
    MEAN = 3
    """The mean over the old axis (LEMON's pad)."""
    RANDOM = 4
    """A value as at initialisation."""
    ZERO = 5


@dataclass(frozen=True)
class AxisMap:
    """``new unit -> old unit``, and how the copies share what the unit wrote and was read for.

    All tensors have one entry per new unit, ``[N']``.

    Attributes:
        old: N, the size of the old axis.
        index: int64, the unit that is copied; a unit that is no copy stands beside that one.
        counts: fp64, copies of that unit.
        write: fp64, ``rho``: scale of a copy where the axis is written.
        read: fp64, ``alpha``: scale of a copy where it is read; sums to one over the copies of a unit when exact.
        written: int8, :class:`Fill` where the axis is written.
        reads: int8, :class:`Fill` where it is read.
        original: bool, the unit is the old one and not an added copy.
        eta: factor of the root mean square of a residual stream mapped so.
        pick: each written copy reads one copy of every unit and not a share of all (block-diagonal).
    """

    old: int
    index: Tensor
    counts: Tensor
    write: Tensor
    read: Tensor
    written: Tensor
    reads: Tensor
    original: Tensor
    eta: float = 1.0
    pick: bool = False

    @property
    def new(self) -> int:
        """N'."""
        return len(self.index)

    @property
    def identity(self) -> bool:
        """Whether nothing changes."""
        return self.new == self.old and bool((self.index == torch.arange(self.old)).all()) and bool(self.plain)

    @property
    def plain(self) -> bool:
        """Whether every unit is a copy."""
        return not bool(self.written.any() or self.reads.any())

    @property
    def deterministic(self) -> bool:
        """Whether each unit is made of the one that it stands beside, alone: a copy, a new unit like it, or zero."""
        fills = torch.cat([self.written, self.reads])
        return not self.pick and bool(torch.isin(fills, torch.tensor([Fill.COPY, Fill.TILE, Fill.ZERO])).all())

    @property
    def uniform(self) -> bool:
        """Whether every unit has the same number of copies and there is nothing else."""
        return self.plain and bool((self.counts == self.counts[0]).all())

    @property
    def number(self) -> Tensor:
        """Which copy of its unit each new unit is, counted from 0; int64 ``[N']``."""
        order = torch.argsort(self.index, stable=True)
        ordered = self.index[order]
        first = torch.searchsorted(ordered, ordered)
        return torch.empty_like(order).scatter_(0, order, torch.arange(self.new) - first)

    def fill(self, places: Tensor, written: Fill, reads: Fill) -> AxisMap:
        """The same map with the units where ``places`` (bool ``[N']``) no copies any more."""
        counts = torch.bincount(self.index[~places], minlength=self.old).double()[self.index]
        counts = torch.where(places, torch.ones_like(counts), counts)
        return replace(
            self,
            counts=counts,
            read=1.0 / counts,
            written=torch.where(places, int(written), self.written).to(torch.int8),
            reads=torch.where(places, int(reads), self.reads).to(torch.int8),
            original=self.original & ~places,
        )

    def then(self, later: AxisMap) -> AxisMap:
        """The map of this growth followed by ``later``.

        Raises:
            ValueError: units that are no copies do not compose.
        """
        if not (self.plain and later.plain) or self.pick or later.pick:
            raise ValueError("only growths by copying compose")
        at = later.index
        return AxisMap(
            old=self.old,
            index=self.index[at],
            counts=self.counts[at] * later.counts,
            write=self.write[at] * later.write,
            read=self.read[at] * later.read,
            written=torch.zeros_like(later.written),
            reads=torch.zeros_like(later.reads),
            original=self.original[at] & later.original,
            eta=self.eta * later.eta,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values from which :meth:`from_json` makes the same map, bit for bit."""
        arrays = ("index", "counts", "write", "read", "written", "reads", "original")
        return {"old": self.old, "new": self.new, "eta": self.eta, "pick": self.pick} | {
            name: _packed(getattr(self, name)) for name in arrays
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> AxisMap:
        """The inverse of :meth:`to_json`."""
        types = {"index": "<i8", "written": "i1", "reads": "i1", "original": "?"}
        arrays = {
            name: _unpacked(text, types.get(name, "<f8")) for name, text in fields.items() if isinstance(text, str)
        }
        return cls(old=fields["old"], eta=fields["eta"], pick=fields["pick"], **arrays)


def _packed(values: Tensor) -> str:
    return base64.b64encode(zlib.compress(values.numpy().tobytes(), 9)).decode()


def _unpacked(text: str, kind: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=kind).copy())


def axis_map(index: Tensor, old: int) -> AxisMap:
    """The map that copies ``index`` and splits reads evenly; the first copy of a unit is the original."""
    counts = torch.bincount(index, minlength=old).double()[index]
    ones = torch.ones_like(counts)
    nothing = torch.zeros(len(index), dtype=torch.int8)
    out = AxisMap(old, index, counts, ones, 1.0 / counts, nothing, nothing, torch.ones(len(index), dtype=torch.bool))
    return replace(out, original=out.number == 0)


def floor_map(old: int, new: int) -> AxisMap:
    """``i -> floor(i * old / new)``: commutes with cutting the axis into equal parts (growth.md, section 2)."""
    return axis_map(torch.arange(new) * old // new, old)


def random_map(old: int, new: int, generator: np.random.RandomState) -> AxisMap:
    """The identity, then copies drawn with replacement (ELLE's ``get_choices``; elle.md, 1.2)."""
    extra = torch.from_numpy(generator.randint(0, old, size=new - old).astype(np.int64))
    return axis_map(torch.cat([torch.arange(old), extra]), old)


def appended_map(old: int, new: int, fill: Fill) -> AxisMap:
    """The identity, and behind it units that are no copies; they stand beside ``i mod old``."""
    index = torch.arange(new) % old
    return axis_map(index, old).fill(torch.arange(new) >= old, fill, Fill.ZERO)


def head_dim_map(old: int, new: int, rotary: bool) -> AxisMap:
    """New channels of a head: random where written, zero where read (arXiv 2308.06103, sections 3.3 and 3.4).

    Under RoPE channel ``i`` is turned together with ``i + head_dim / 2``: both halves get theirs at their end.
    """
    if not rotary:
        return appended_map(old, new, Fill.RANDOM)
    half = torch.arange(new // 2)
    index = torch.cat([half % (old // 2), half % (old // 2) + old // 2])
    fresh = half >= old // 2
    return axis_map(index, old).fill(torch.cat([fresh, fresh]), Fill.RANDOM, Fill.ZERO)


def slot_map(queries: AxisMap) -> AxisMap:
    """The map of a group's slots, its queries then its key and value, from the map of its queries."""
    two = torch.ones(2, dtype=torch.float64)
    none = torch.zeros(2, dtype=torch.int8)
    old = queries.old
    return replace(
        queries,
        old=old + 2,
        index=torch.cat([queries.index, torch.tensor([old, old + 1])]),
        counts=torch.cat([queries.counts, two]),
        write=torch.cat([queries.write, two]),
        read=torch.cat([queries.read, two]),
        written=torch.cat([queries.written, none]),
        reads=torch.cat([queries.reads, none]),
        original=torch.cat([queries.original, torch.ones(2, dtype=torch.bool)]),
    )


def dim_map(dim: Dim, maps: Mapping[Axis, AxisMap], sizes: Mapping[Axis, int]) -> AxisMap | None:
    """The map of a whole dimension from those of its axes (``sizes``: the old ones); ``None`` if nothing moves."""
    if not any(axis in maps for axis in dim.axes):
        return None
    out = floor_map(1, 1)
    for axis in dim.axes:
        out = _times(out, maps.get(axis) or floor_map(sizes[axis], sizes[axis]))
    if Axis.SLOT in dim.axes and Axis.HEAD_DIM in maps:
        out = _keys_of_longer_heads(dim, out, maps, sizes)
    return out


def _times(outer: AxisMap, inner: AxisMap) -> AxisMap:
    """The map of the product of two axes."""

    def product(left: Tensor, right: Tensor) -> Tensor:
        return (left[:, None] * right).reshape(-1)

    def largest(left: Tensor, right: Tensor) -> Tensor:
        return torch.maximum(left[:, None], right[None]).reshape(-1)

    return AxisMap(
        old=outer.old * inner.old,
        index=(outer.index[:, None] * inner.old + inner.index).reshape(-1),
        counts=product(outer.counts, inner.counts),
        write=product(outer.write, inner.write),
        read=product(outer.read, inner.read),
        written=largest(outer.written, inner.written),
        reads=largest(outer.reads, inner.reads),
        original=(outer.original[:, None] & inner.original).reshape(-1),
        eta=outer.eta * inner.eta,
        pick=outer.pick or inner.pick,
    )


def _keys_of_longer_heads(dim: Dim, item: AxisMap, maps: Mapping[Axis, AxisMap], sizes: Mapping[Axis, int]) -> AxisMap:
    """Scores are divided by ``sqrt(head_dim)``: old key channels grow by the root of the ratio, new ones are zero."""
    shape = [maps[axis].new if axis in maps else sizes[axis] for axis in dim.axes]
    slot, channel = dim.axes.index(Axis.SLOT), dim.axes.index(Axis.HEAD_DIM)
    places = torch.zeros(shape, dtype=torch.bool)
    places.select(slot, shape[slot] - 2)[...] = True
    keys = places.reshape(-1)
    heads = maps[Axis.HEAD_DIM]
    fresh = (heads.written > 0).view([-1 if axis == channel else 1 for axis in range(len(shape))])
    silent = keys & fresh.expand(shape).reshape(-1)
    ratio = (heads.new / heads.old) ** 0.5
    return replace(
        item,
        write=torch.where(keys, item.write * ratio, item.write),
        written=torch.where(silent, int(Fill.ZERO), item.written).to(torch.int8),
    )
