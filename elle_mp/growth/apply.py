"""Grows a live model and its optimizer state on the shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from elle_mp.axes import Axis
from elle_mp.growth.blocks import Block, grow_moment, grow_weight
from elle_mp.growth.layout import Alignment, Layout, OldParameters
from elle_mp.growth.plan import GrowthPlan
from elle_mp.growth.tensors import TensorGrowth, parameter_growths
from elle_mp.models.transformer import Transformer
from elle_mp.ops.random import Bounds
from elle_mp.parallel.sharding import local_tensor, my_bounds, named_specs


@dataclass
class Moments:
    """Adam's state of one parameter: this rank's shard of both moments, and the step count (a scalar tensor)."""

    step: Tensor
    first: Tensor
    second: Tensor


@dataclass
class Traffic:
    """What a growth sent.

    Attributes:
        received: bytes that this rank received; 0 when every cut is aligned, and then no collective was issued.
        recut: the new parameters for which an old one was gathered, one tensor at a time.
    """

    received: int = 0
    recut: list[str] = field(default_factory=list)


@torch.no_grad()
def grow_on_shards(
    plan: GrowthPlan,
    old: Transformer,
    new: Transformer,
    old_moments: Mapping[str, Moments],
    new_moments: Mapping[str, Moments],
) -> Traffic:
    """Fills ``new`` and its moments from ``old``, parameter by parameter.

    Every rank maps its own shards. Where a cut does not align with a map, the old parameter concerned is gathered,
    one tensor at a time.
    """
    source = _Shards(old)
    alignment = Alignment(source.parameters, Layout(old.grid.tp_size, old.grid.size("shard")))
    traffic = Traffic()
    for name, growth in parameter_growths(plan, dict(named_specs(new))).items():
        recut = alignment.recut(growth)
        if recut:
            traffic.recut.append(name)
        bounds = my_bounds(growth.spec, growth.shape, new.grid)
        blocks = dict(source.blocks(growth, bounds, recut, traffic))
        grow_weight(growth, blocks, bounds, local_tensor(new.get_parameter(name)))
        blocks.clear()
        state = new_moments[name]
        if growth.source is None or growth.moments == "reset":
            for tensor in (state.step, state.first, state.second):
                tensor.zero_()
            continue
        moments = old_moments[growth.source]
        for degree, values, target in ((1, moments.first, state.first), (2, moments.second, state.second)):
            block = source.block(growth.source, values, growth.source in recut, traffic)
            grow_moment(growth, block, bounds, target, degree)
        state.step.copy_(moments.step)
    _grow_norm_stats(plan, old, new)
    return traffic


class _Shards:
    """The old model's shards, gathered where they must be."""

    def __init__(self, model: Transformer) -> None:
        self.grid = model.grid
        self.tensors: dict[str, Tensor] = dict(model.named_parameters())
        specs = dict(named_specs(model))
        self.parameters = OldParameters(specs, {name: spec.shape(model.sizes) for name, spec in specs.items()})

    def blocks(
        self, growth: TensorGrowth, bounds: Bounds, recut: tuple[str, ...], traffic: Traffic
    ) -> Iterator[tuple[str, Block]]:
        """The old weights behind a block of the new one, whole shards or whole tensors, cut to what is needed."""
        needs = growth.needs(bounds)
        for name in growth.reads:
            block = self.block(name, local_tensor(self.tensors[name]), name in recut, traffic)
            yield name, _narrowed(block, needs[name])

    def block(self, name: str, local: Tensor, gather: bool, traffic: Traffic) -> Block:
        """This rank's shard of a tensor laid out as the parameter ``name``, or all of it."""
        shape = self.parameters.shapes[name]
        like = self.tensors[name]
        if not gather or not isinstance(like, DTensor):
            return Block(local, my_bounds(self.parameters.specs[name], shape, self.grid))
        shard = DTensor.from_local(
            local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
        traffic.received += (like.numel() - local.numel()) * like.element_size()
        return Block(shard.full_tensor(), tuple((0, size) for size in shape))


def _narrowed(block: Block, needed: Bounds) -> Block:
    if any(start == stop for start, stop in needed):
        return block
    values = block.values
    for dim, ((low, _), (start, stop)) in enumerate(zip(block.bounds, needed, strict=True)):
        values = values.narrow(dim, start - low, stop - start)
    return Block(values, needed)


def _grow_norm_stats(plan: GrowthPlan, old: Transformer, new: Transformer) -> None:
    """Statistics' weights: a unit's weight is shared by its copies (growth.md, 1.1)."""
    if new.norm_stats is None:
        return
    weights = old.norm_stats
    if weights is None:
        weights = torch.full((plan.old.embed,), 1.0 / plan.old.embed, dtype=torch.float64)
    new.norm_stats.copy_(grown_norm_stats(plan, weights.cpu()))


def grown_norm_stats(plan: GrowthPlan, weights: Tensor) -> Tensor:
    """The statistics' weights ``[D']`` after growth, from those before (fp64 ``[D]``)."""
    embed = plan.maps.get(Axis.EMBED)
    return weights if embed is None else weights[embed.index] / embed.counts
