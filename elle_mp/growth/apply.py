"""Grows a live model and its optimizer state on the shards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from elle_mp.axes import Axis
from elle_mp.growth.plan import GrowthPlan
from elle_mp.growth.tensors import TensorGrowth, grow_block, grow_moment, plan_tensor
from elle_mp.models.transformer import Transformer
from elle_mp.ops.random import Bounds
from elle_mp.parallel.mesh import Grid
from elle_mp.parallel.sharding import local_tensor, my_bounds, named_specs, shard_bounds


@dataclass
class Moments:
    """Adam's state of one parameter: this rank's shard of both moments, and the step count (a scalar tensor)."""

    step: Tensor
    first: Tensor
    second: Tensor


@torch.no_grad()
def grow_on_shards(
    plan: GrowthPlan,
    old: Transformer,
    new: Transformer,
    old_moments: Mapping[str, Moments],
    new_moments: Mapping[str, Moments],
) -> int:
    """Fills ``new`` and its moments from ``old``, parameter by parameter.

    Every rank maps its own shards. Where a cut does not align with a map, that one parameter is gathered, one
    tensor at a time.

    Returns:
        Bytes this rank received: 0 when every cut is aligned, and then no collective was issued.
    """
    grid = old.grid
    sources = dict(old.named_parameters())
    old_specs = dict(named_specs(old))
    received = 0
    for name, spec in named_specs(new):
        growth = plan_tensor(plan, name, spec)
        target = local_tensor(new.get_parameter(name))
        state = new_moments[name]
        if growth.source is None:
            target.zero_()
            _reset(state)
            continue
        shape = old_specs[growth.source].shape(old.sizes)
        aligned = _aligned(growth, shape, grid)
        bounds = my_bounds(spec, growth.shape, grid)
        held = my_bounds(spec, shape, grid) if aligned else tuple((0, size) for size in shape)
        source = sources[growth.source]

        def whole(local: Tensor, source: Tensor = source, aligned: bool = aligned) -> Tensor:
            return local if aligned else _gathered(source, local)

        target.copy_(grow_block(growth, plan, whole(local_tensor(source)), held, bounds))
        received += 0 if aligned else _bytes(source)
        moments = old_moments[growth.source]
        if growth.fresh:
            _reset(state)
            continue
        state.first.copy_(grow_moment(growth, whole(moments.first), held, bounds, 1))
        state.second.copy_(grow_moment(growth, whole(moments.second), held, bounds, 2))
        state.step.copy_(moments.step)
        received += 0 if aligned else 2 * _bytes(source)
    _grow_norm_stats(plan, old, new)
    return received


def _reset(state: Moments) -> None:
    for tensor in (state.step, state.first, state.second):
        tensor.zero_()


def _aligned(growth: TensorGrowth, old_shape: tuple[int, ...], grid: Grid) -> bool:
    """Whether on every rank the new shard is made of the old shard alone (the same answer on all ranks)."""
    for tp_rank in range(grid.tp_size):
        for dp_rank in range(grid.size("dp_shard")):
            place = (tp_rank, grid.tp_size), (dp_rank, grid.size("dp_shard"))
            held = shard_bounds(growth.spec, old_shape, *place)
            needed = growth.source_bounds(shard_bounds(growth.spec, growth.shape, *place))
            if not _inside(needed, held):
                return False
    return True


def _inside(needed: Bounds, held: Bounds) -> bool:
    if any(start == stop for start, stop in needed):
        return True
    return all(a >= c and b <= d for (a, b), (c, d) in zip(needed, held, strict=True))


def _gathered(like: Tensor, local: Tensor) -> Tensor:
    """The whole tensor of which ``local`` is this rank's shard, laid out as ``like``."""
    if not isinstance(like, DTensor):
        return local
    shard = DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return shard.full_tensor()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _grow_norm_stats(plan: GrowthPlan, old: Transformer, new: Transformer) -> None:
    """Statistics' weights: a unit's weight is shared by its copies (growth.md, 1.1)."""
    if new.norm_stats is None:
        return
    weights = old.norm_stats
    if weights is None:
        weights = torch.full((plan.old.embed,), 1.0 / plan.old.embed, dtype=torch.float64)
    embed = plan.maps.get(Axis.EMBED)
    weights = weights.cpu()
    new.norm_stats.copy_(weights if embed is None else weights[embed.index] / embed.counts)
