"""What ``expand`` is told of a block: flat indices, scales, groups of copies, codes; made once for layers alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from elle_mp.growth.maps import Fill
from elle_mp.ops.expand import FORBIDDEN, KEPT, MEAN, RANDOM, Index
from elle_mp.ops.random import Bounds

if TYPE_CHECKING:
    from elle_mp.growth.tensors import DimGrowth

Dims = tuple["DimGrowth | None", ...]

_MOST = 256


@dataclass
class Known:
    """Answers found before, for dimensions and bounds alike: the layers of a model share them.

    They are held with the dimensions that they are for, so that an ``id`` stays one dimension's.
    """

    answers: dict[tuple[object, ...], tuple[Dims, object]] = field(default_factory=dict)

    def get(self, dims: Dims, *key: object) -> object | None:
        """The answer for these dimensions and this key, or ``None``."""
        found = self.answers.get((*map(id, dims), *key))
        return None if found is None else found[1]

    def put(self, answer: object, dims: Dims, *key: object) -> None:
        """Keeps an answer; of too many, the oldest goes."""
        if len(self.answers) >= _MOST:
            del self.answers[next(iter(self.answers))]
        self.answers[(*map(id, dims), *key)] = (dims, answer)


def indices_of(
    dims: Dims,
    bounds: Bounds,
    old: Bounds,
    scales: tuple[Tensor | None, ...],
    means: bool,
) -> Index:
    """The block ``bounds`` of a tensor, made of the block ``old`` of the old one, both as one matrix.

    Its last dimension is the columns, all others are the rows.

    Args:
        scales: fp64, of each dimension's entries.
        means: units that hold the mean over the old axis are wanted as that, without a scale of their own.

    Raises:
        ValueError: a mean along neither the last dimension nor the first of two.
    """
    parts: list[tuple[Tensor, Tensor | None]] = []
    for dim, (item, scale, (low, _), (start, stop)) in enumerate(zip(dims, scales, old, bounds, strict=True)):
        if item is None:
            parts.append((torch.arange(start - low, stop - low), None))
            continue
        index, part = item.item.index[start:stop] - low, None if scale is None else scale[start:stop]
        if means and Fill.MEAN in item.fills:
            if dim != len(dims) - 1 and len(dims) != 2:
                raise ValueError(f"no mean along dimension {dim} of {len(dims)}")
            places = item.fill[start:stop] == int(Fill.MEAN)
            index = torch.where(places, MEAN, index)
            part = None if part is None else torch.where(places, 1.0, part)
        parts.append((index, part))
    rows = torch.zeros(1, dtype=torch.int64)
    row_scale: Tensor | None = None
    for dim, (index, part) in enumerate(parts[:-1]):
        size = old[dim][1] - old[dim][0]
        rows = index if dim == 0 else (rows[:, None] * size + index).reshape(-1)
        if row_scale is not None or part is not None:
            before = torch.ones(1, dtype=torch.float64) if row_scale is None else row_scale
            row_scale = (before[:, None] * (part if part is not None else torch.ones(len(index)))).reshape(-1)
    return Index(rows, parts[-1][0], _unless_ones(row_scale), _unless_ones(parts[-1][1]))


def _unless_ones(scale: Tensor | None) -> Tensor | None:
    return None if scale is None or bool((scale == 1.0).all()) else scale


def groups_of(item: DimGrowth, start: int, stop: int) -> Tensor:
    """Copies of a unit share a number; what is no copy has one of its own."""
    place = torch.arange(start, stop) + item.item.old
    return torch.where(item.fill[start:stop] == int(Fill.COPY), item.item.index[start:stop], place)


def random_codes(dims: Dims, bounds: Bounds) -> tuple[Tensor, Tensor]:
    """What rows and columns say of random values: uint8 ``[R']`` and ``[C']``."""
    codes = [_codes(item, *part) for item, part in zip(dims, bounds, strict=True)]
    rows = torch.zeros(1, dtype=torch.uint8)
    for part in codes[:-1]:
        rows = torch.maximum(rows[:, None], part).reshape(-1)
    return rows, codes[-1]


def _codes(item: DimGrowth | None, start: int, stop: int) -> Tensor:
    if item is None:
        return torch.full((stop - start,), KEPT, dtype=torch.uint8)
    fill = item.fill[start:stop]
    wanted = torch.where(fill == int(Fill.RANDOM), RANDOM, KEPT)
    return torch.where(fill == int(Fill.ZERO), FORBIDDEN, wanted).to(torch.uint8)
