"""Computes a block of a grown weight or moment from the old blocks that it needs; the same bits for every cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from elle_mp.growth.maps import Fill
from elle_mp.growth.tensors import DimGrowth, TensorGrowth, moment_factor
from elle_mp.ops.expand import FORBIDDEN, KEPT, RANDOM, Noise, expand, fill_random, noise_key
from elle_mp.ops.random import Bounds, normal_block


@dataclass(frozen=True)
class Block:
    """Part of a tensor: its values and the global indices they have."""

    values: Tensor
    bounds: Bounds


Blocks = Mapping[str, Block]


@torch.no_grad()
def grow_weight(growth: TensorGrowth, blocks: Blocks, bounds: Bounds, out: Tensor) -> None:
    """Writes the block ``bounds`` of the grown weight into ``out``."""
    if out.numel() == 0:
        return
    if growth.source is None:
        out.fill_(growth.treatment.constant or 0.0)
        return
    source = _folded(growth, blocks)
    scales = tuple(None if item is None else item.scale for item in growth.dims)
    _expand(growth, source, bounds, scales, out, growth.noise)
    if growth.treatment.zero or growth.pick:
        _leave_noise_alone(growth, source, bounds, scales, out)
    if growth.treatment.zero:
        return
    if growth.above is not None:
        _take_from_above(growth, blocks[growth.above], bounds, scales, out)
    for dim, item in enumerate(growth.dims):
        if item is not None and item.has(Fill.MEAN):
            _fill_means(growth, source, dim, bounds, scales, out)
    _fill_random(growth, bounds, out)
    if growth.copy_noise is not None:
        _noise_on_copies(growth, growth.copy_noise, bounds, out)


@torch.no_grad()
def grow_moment(growth: TensorGrowth, block: Block, bounds: Bounds, out: Tensor, degree: int) -> None:
    """Writes the block of Adam's moment of ``degree`` 1 or 2 in the gradient into ``out``, from one of the old."""
    if out.numel() == 0:
        return
    factors = tuple(None if item is None else moment_factor(item, growth.moments, degree) for item in growth.dims)
    _expand(growth, block, bounds, factors, out, None)
    if growth.pick:
        out.mul_(_picked(growth, bounds).to(out))


def _expand(
    growth: TensorGrowth,
    block: Block,
    bounds: Bounds,
    scales: tuple[Tensor | None, ...],
    out: Tensor,
    noise: float | None,
) -> None:
    """``out = block[maps] * scales`` as one matrix: the last dimension is columns, all others are rows."""
    indices = [
        torch.arange(start - low, stop - low) if item is None else item.item.index[start:stop] - low
        for item, (low, _), (start, stop) in zip(growth.dims, block.bounds, bounds, strict=True)
    ]
    parts = [None if scale is None else scale[start:stop] for scale, (start, stop) in zip(scales, bounds, strict=True)]
    rows, row_scale = torch.zeros(1, dtype=torch.int64), None
    for dim, (index, part) in enumerate(zip(indices[:-1], parts[:-1], strict=True)):
        rows = (rows[:, None] * block.values.shape[dim] + index).reshape(-1)
        if row_scale is not None or part is not None:
            before = torch.ones(1, dtype=torch.float64) if row_scale is None else row_scale
            row_scale = (before[:, None] * (part if part is not None else torch.ones(len(index)))).reshape(-1)
    made = None
    last = growth.dims[-1]
    if noise is not None and last is not None:
        start, stop = bounds[-1]
        first_row = bounds[0][0] * prod(growth.shape[1:-1]) if len(bounds) > 1 else 0
        made = Noise(noise_key(growth.seed, growth.stream), noise, first_row, start, _groups(growth, start, stop))
    width = block.values.shape[-1]
    expand(
        block.values.reshape(-1, width) if width else block.values.reshape(0, 0),
        rows,
        indices[-1],
        row_scale,
        parts[-1],
        out.view(-1, out.shape[-1]),
        made,
    )


def _groups(growth: TensorGrowth, start: int, stop: int) -> Tensor:
    """Copies of a unit share a number; what is no copy has one of its own."""
    item = growth.dims[-1]
    if item is None:
        raise ValueError(f"{growth.name}: no copies along its last dimension")
    place = torch.arange(start, stop) + item.item.old
    return torch.where(item.fill[start:stop] == int(Fill.COPY), item.item.index[start:stop], place)


def _folded(growth: TensorGrowth, blocks: Blocks) -> Block:
    """The old block, with a norm's weight and bias taken over when the depth strategy says so."""
    source = blocks[growth.source or ""]
    if growth.treatment.fold is None:
        return source
    gain, shift = (blocks[name].values for name in growth.treatment.fold)
    if growth.folded_weight is None:
        return Block(source.values * gain, source.bounds)
    weight = blocks[growth.folded_weight].values
    return Block(source.values + _sum(weight * shift, 1).squeeze(1), source.bounds)


def _leave_noise_alone(
    growth: TensorGrowth, source: Block, bounds: Bounds, scales: tuple[Tensor | None, ...], out: Tensor
) -> None:
    """Only chosen copies (block-diagonal), or none (an added layer), keep the value; the noise cancels over all.

    Without the noise, copies inside an added layer would never separate.
    """
    kept = _picked(growth, bounds).to(out.device) & (not growth.treatment.zero) if growth.pick else None
    if growth.noise is None:
        out.zero_() if kept is None else out.mul_(kept)
        return
    plain = torch.empty_like(out)
    _expand(growth, source, bounds, scales, plain, None)
    out.sub_(plain)
    if kept is not None:
        out.add_(plain.mul_(kept))


def _take_from_above(
    growth: TensorGrowth, above: Block, bounds: Bounds, scales: tuple[Tensor | None, ...], out: Tensor
) -> None:
    values = torch.empty_like(out)
    _expand(growth, above, bounds, scales, values, growth.noise)
    out.copy_(torch.where(_any(growth, bounds, Fill.NEXT).to(out.device), values, out))


def _fill_means(
    growth: TensorGrowth,
    source: Block,
    dim: int,
    bounds: Bounds,
    scales: tuple[Tensor | None, ...],
    out: Tensor,
) -> None:
    """Units along ``dim`` that hold the mean over the old axis: one line of the tensor, whatever its size."""
    item = growth.dims[dim]
    start, stop = bounds[dim]
    if item is None or not bool((item.fill[start:stop] == int(Fill.MEAN)).any()):
        return
    line = _sum(source.values, dim) / source.values.shape[dim]
    for index, other in enumerate(growth.dims):
        if other is None or index == dim:
            continue
        first, last = bounds[index]
        line = line.index_select(index, (other.item.index[first:last] - source.bounds[index][0]).to(line.device))
        scale = scales[index]
        if scale is not None:
            line = (line * _along(scale[first:last], index, line)).to(out.dtype)
    places = torch.nonzero(item.fill[start:stop] == int(Fill.MEAN)).squeeze(1).to(out.device)
    shape = [len(places) if index == dim else size for index, size in enumerate(out.shape)]
    out.index_copy_(dim, places, line.to(out.dtype).expand(shape))


def _sum(values: Tensor, dim: int) -> Tensor:
    """The sum along ``dim``, kept, by halves: the same additions however the other dimensions are cut."""
    size = values.shape[dim]
    if size == 1:
        return values
    total = values.narrow(dim, 0, size // 2) + values.narrow(dim, size // 2, size // 2)
    while True:
        if size % 2:
            total.narrow(dim, 0, 1).add_(values.narrow(dim, size - 1, 1))
        size, values = size // 2, total
        if size == 1:
            return total.narrow(dim, 0, 1)
        total.narrow(dim, 0, size // 2).add_(total.narrow(dim, size // 2, size // 2))


def _fill_random(growth: TensorGrowth, bounds: Bounds, out: Tensor) -> None:
    """Entries that are new and free: as at initialisation, by global index."""
    if not any(item is not None and item.has(Fill.RANDOM) for item in growth.dims):
        return
    codes = [_random_codes(item, *part) for item, part in zip(growth.dims, bounds, strict=True)]
    rows = torch.zeros(1, dtype=torch.uint8)
    for part in codes[:-1]:
        rows = torch.maximum(rows[:, None], part).reshape(-1)
    first_row = bounds[0][0] * prod(growth.shape[1:-1]) if len(bounds) > 1 else 0
    key = noise_key(growth.seed, f"{growth.stream}/random")
    fill_random(out.view(-1, out.shape[-1]), rows, codes[-1], growth.spec.std or 0.0, key, first_row, bounds[-1][0])


def _random_codes(item: DimGrowth | None, start: int, stop: int) -> Tensor:
    if item is None:
        return torch.full((stop - start,), KEPT, dtype=torch.uint8)
    fill = item.fill[start:stop]
    wanted = torch.where(fill == int(Fill.RANDOM), RANDOM, KEPT)
    return torch.where(fill == int(Fill.ZERO), FORBIDDEN, wanted).to(torch.uint8)


def _noise_on_copies(growth: TensorGrowth, std: float, bounds: Bounds, out: Tensor) -> None:
    """Only copies, not originals, are noised, and the noise does not cancel (elle.md, 1.6)."""
    last = growth.dims[-1]
    if last is None:
        return
    start, stop = bounds[-1]
    xi = normal_block(growth.seed, growth.stream, growth.shape, bounds, torch.float64).to(out.device)
    out.add_((std * xi * ~last.item.original[start:stop].to(out.device)).to(out.dtype))


def _picked(growth: TensorGrowth, bounds: Bounds) -> Tensor:
    """Whether writer copy ``a`` reads this copy of a unit that has ``c``: the one numbered ``a mod c``."""
    write, read = growth.dims
    if write is None or read is None:
        raise ValueError(f"{growth.name}: block-diagonal along one dimension")
    (first, last), (start, stop) = bounds
    counts = read.item.counts[start:stop].long()
    return write.number[first:last, None] % counts == read.number[start:stop]


def _any(growth: TensorGrowth, bounds: Bounds, fill: Fill) -> Tensor:
    """Entries of the block of which some dimension is filled so; bool of the block's shape."""
    shape = [stop - start for start, stop in bounds]
    out = torch.zeros(shape, dtype=torch.bool)
    for dim, (item, (start, stop)) in enumerate(zip(growth.dims, bounds, strict=True)):
        if item is not None:
            out |= _along(item.fill[start:stop] == int(fill), dim, out)
    return out


def _along(values: Tensor, dim: int, like: Tensor) -> Tensor:
    return values.to(like.device).view([-1 if index == dim else 1 for index in range(like.dim())])
