"""Index maps of axes: which old unit each new unit is a copy of (growth.md, sections 0 and 2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from elle_mp.axes import Axis, Dim


@dataclass(frozen=True)
class AxisMap:
    """``new unit -> old unit``, with the number of copies of that old unit.

    Attributes:
        index: int64 ``[N']``, values in ``[0, old)``.
        old: N.
        counts: fp64 ``[N']``, copies of the unit that each new unit copies.
        isometric: copies carry ``1 / sqrt(count)`` of the unit (``iso``), not the unit itself.
    """

    index: Tensor
    old: int
    counts: Tensor
    isometric: bool = False

    @property
    def identity(self) -> bool:
        """Whether nothing changes."""
        return len(self.index) == self.old and bool((self.index == torch.arange(self.old)).all())

    @property
    def uniform(self) -> bool:
        """Whether every unit has the same number of copies."""
        return bool((self.counts == self.counts[0]).all())

    @property
    def rho(self) -> Tensor:
        """Write scale of each copy."""
        return self.counts.rsqrt() if self.isometric else torch.ones_like(self.counts)

    @property
    def alpha(self) -> Tensor:
        """Read scale of each copy: an even split."""
        return 1.0 / self.counts

    @property
    def eta(self) -> float:
        """Factor of the root mean square of a residual stream mapped so (growth.md, 1.1)."""
        return float(np.sqrt(self.old / len(self.index))) if self.isometric else 1.0


def axis_map(index: Tensor, old: int, isometric: bool = False) -> AxisMap:
    """The map with the given index; counts its copies."""
    counts = torch.bincount(index, minlength=old).double()[index]
    return AxisMap(index, old, counts, isometric)


def floor_map(old: int, new: int, isometric: bool = False) -> AxisMap:
    """``i -> floor(i * old / new)``: commutes with cutting the axis into equal parts (growth.md, section 2)."""
    return axis_map(torch.arange(new) * old // new, old, isometric)


def random_map(old: int, new: int, generator: np.random.RandomState) -> AxisMap:
    """The identity, then copies drawn with replacement (ELLE's ``get_choices``; elle.md, 1.2)."""
    extra = torch.from_numpy(generator.randint(0, old, size=new - old).astype(np.int64))
    return axis_map(torch.cat([torch.arange(old), extra]), old)


def slot_map(queries: AxisMap) -> AxisMap:
    """The map of a group's slots, its queries then its key and value, from the map of its queries."""
    old = queries.old
    index = torch.cat([queries.index, torch.tensor([old, old + 1])])
    counts = torch.cat([queries.counts, torch.ones(2, dtype=torch.float64)])
    return AxisMap(index, old + 2, counts)


def dim_map(dim: Dim, maps: Mapping[Axis, AxisMap], sizes: Mapping[Axis, int]) -> AxisMap | None:
    """The map of a whole dimension from those of its axes (``sizes``: the old ones); ``None`` if nothing moves."""
    if not any(axis in maps for axis in dim.axes):
        return None
    index = torch.zeros(1, dtype=torch.int64)
    counts = torch.ones(1, dtype=torch.float64)
    isometric = False
    for axis in dim.axes:
        part = maps.get(axis) or floor_map(sizes[axis], sizes[axis])
        index = (index[:, None] * part.old + part.index).reshape(-1)
        counts = (counts[:, None] * part.counts).reshape(-1)
        isometric |= part.isometric
    return AxisMap(index, dim.size(sizes), counts, isometric)
