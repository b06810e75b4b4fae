"""Computes a block of a grown weight or moment from the old blocks that it needs; the same bits for every cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from elle_mp.growth.indices import groups_of, indices_of, random_codes
from elle_mp.growth.maps import Fill
from elle_mp.growth.tensors import TensorGrowth, moment_factor
from elle_mp.ops.expand import RANDOM, Expansions, Fresh, Index, Noise, expand, sum_by_halves
from elle_mp.ops.philox import stream_key
from elle_mp.ops.random import Bounds, normal_block


@dataclass(frozen=True)
class Block:
    """Part of a tensor: its values and the global indices they have."""

    values: Tensor
    bounds: Bounds


Blocks = Mapping[str, Block]


@torch.no_grad()
def grow_weight(
    growth: TensorGrowth, blocks: Blocks, bounds: Bounds, out: Tensor, later: Expansions | None = None
) -> None:
    """Writes the block ``bounds`` of the grown weight into ``out``; ``later`` may do so after the return."""
    if out.numel() == 0:
        return
    if growth.source is None:
        out.fill_(growth.treatment.constant or 0.0)
        return
    if growth.treatment.zero and growth.noise is None:
        out.zero_() if later is None else later.zero(out)
        return
    source = _folded(growth, blocks)
    noise = _noise(growth, bounds)
    if growth.treatment.zero or growth.pick:
        _write_noise_alone(growth, source, bounds, out, noise)
        return
    fresh = _fresh(growth, bounds)
    if growth.above is not None or growth.copy_noise is not None:
        later = None  # what follows changes ``out``
    _expand(source, _weights(growth, source, bounds), out, noise, fresh, later)
    if growth.above is not None:
        _take_from_above(growth, blocks[growth.above], bounds, out, noise, fresh)
    if growth.copy_noise is not None:
        _noise_on_copies(growth, growth.copy_noise, bounds, out)


@torch.no_grad()
def grow_moment(
    growth: TensorGrowth, block: Block, bounds: Bounds, out: Tensor, degree: int, later: Expansions | None = None
) -> None:
    """Writes the block of Adam's moment of ``degree`` 1 or 2 in the gradient into ``out``, from one of the old."""
    if out.numel() == 0:
        return
    key = (bounds, block.bounds, growth.moments, degree)
    indices = growth.known.get(growth.dims, *key)
    if not isinstance(indices, Index):
        factors = tuple(None if item is None else moment_factor(item, growth.moments, degree) for item in growth.dims)
        indices = indices_of(growth.dims, bounds, block.bounds, factors, means=False)
        growth.known.put(indices, growth.dims, *key)
    _expand(block, indices, out, later=None if growth.pick else later)
    if growth.pick:
        out.mul_(_picked(growth, bounds))


def _weights(growth: TensorGrowth, block: Block, bounds: Bounds) -> Index:
    key = (bounds, block.bounds)
    found = growth.known.get(growth.dims, *key)
    if not isinstance(found, Index):
        scales = tuple(None if item is None else item.scale for item in growth.dims)
        found = indices_of(growth.dims, bounds, block.bounds, scales, means=True)
        growth.known.put(found, growth.dims, *key)
    return found


def _expand(
    block: Block,
    indices: Index,
    out: Tensor,
    noise: Noise | None = None,
    fresh: Fresh | None = None,
    later: Expansions | None = None,
) -> None:
    matrix = out if out.dim() == 2 else out.view(-1, out.shape[-1])
    expand(_matrix(block.values), indices, matrix, noise, fresh, later)


def _matrix(values: Tensor) -> Tensor:
    """``[R, C]``: the last dimension is the columns."""
    if values.dim() == 2 and values.stride(1) == 1:
        return values
    width = values.shape[-1]
    return values.reshape(-1, width) if width else values.reshape(0, 0)


def _noise(growth: TensorGrowth, bounds: Bounds) -> Noise | None:
    last = growth.dims[-1]
    if growth.noise is None or last is None:
        return None
    groups = growth.known.get((last,), "groups", bounds[-1])
    if not isinstance(groups, Tensor):
        groups = groups_of(last, *bounds[-1])
        growth.known.put(groups, (last,), "groups", bounds[-1])
    return Noise(stream_key(growth.seed, growth.stream), growth.noise, *_place(growth, bounds), groups)


def _fresh(growth: TensorGrowth, bounds: Bounds) -> Fresh | None:
    """Entries that are new and free: as at initialisation, by global index."""
    if not any(item is not None and Fill.RANDOM in item.fills for item in growth.dims):
        return None
    codes = growth.known.get(growth.dims, "codes", bounds)
    if not isinstance(codes, tuple):
        last = growth.dims[-1]
        before = 0 if last is None else int((last.fill[: bounds[-1][0]] == int(Fill.RANDOM)).sum())
        codes = (*random_codes(growth.dims, bounds), before)
        growth.known.put(codes, growth.dims, "codes", bounds)
    key = stream_key(growth.seed, f"{growth.stream}/random")
    return Fresh(key, growth.spec.std or 0.0, *_place(growth, bounds), *codes)


def _place(growth: TensorGrowth, bounds: Bounds) -> tuple[int, int]:
    """Row and column of the block in the whole tensor as one matrix."""
    return bounds[0][0] * prod(growth.shape[1:-1]) if len(bounds) > 1 else 0, bounds[-1][0]


def _folded(growth: TensorGrowth, blocks: Blocks) -> Block:
    """The old block, with a norm's weight and bias taken over when the depth strategy says so."""
    source = blocks[growth.source or ""]
    if growth.treatment.fold is None:
        return source
    gain, shift = (blocks[name].values for name in growth.treatment.fold)
    if growth.folded_weight is None:
        return Block(source.values * gain, source.bounds)
    weight = blocks[growth.folded_weight].values
    return Block(source.values + sum_by_halves(weight * shift, 1).squeeze(1), source.bounds)


def _write_noise_alone(growth: TensorGrowth, source: Block, bounds: Bounds, out: Tensor, noise: Noise | None) -> None:
    """Only chosen copies (block-diagonal), or none (an added layer), keep the value; the noise cancels over all.

    Without the noise, copies inside an added layer would never separate.
    """
    indices = _weights(growth, source, bounds)
    alone = None if noise is None else replace(noise, alone=True)
    if growth.treatment.zero:
        _expand(source, indices, out, alone)
        return
    _expand(source, indices, out)
    out.mul_(_picked(growth, bounds).to(out.device))
    if alone is not None:
        added = torch.empty_like(out)
        _expand(source, indices, added, alone)
        out.add_(added)
    fresh = _fresh(growth, bounds)
    if fresh is not None:
        drawn = torch.empty_like(out)
        _expand(source, indices, drawn, None, fresh)
        wanted = torch.maximum(fresh.rows[:, None], fresh.cols) == RANDOM
        torch.where(wanted.to(out.device), drawn, out, out=out)


def _take_from_above(
    growth: TensorGrowth, above: Block, bounds: Bounds, out: Tensor, noise: Noise | None, fresh: Fresh | None
) -> None:
    values = torch.empty_like(out)
    _expand(above, _weights(growth, above, bounds), values, noise, fresh)
    places = _any(growth, bounds, Fill.NEXT).to(out.device)
    torch.where(places, values, out, out=out)


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
