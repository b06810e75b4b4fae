"""Grows a live model and its optimizer state on the shards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from elle_mp.axes import Axis, ParamSpec
from elle_mp.growth.blocks import Block, grow_moment, grow_weight
from elle_mp.growth.layout import Alignment, Layout, OldParameters
from elle_mp.growth.plan import GrowthPlan
from elle_mp.growth.tensors import TensorPlanner
from elle_mp.models.declarations import declarations
from elle_mp.models.pipeline import LanguageModel, stage_of, stage_parts
from elle_mp.ops.expand import Expansions
from elle_mp.ops.random import Bounds
from elle_mp.parallel.sharding import local_tensor, my_bounds, named_specs


@dataclass
class Moments:
    """Adam's state of one parameter: this rank's shard of both moments, and the step count (a scalar tensor)."""

    step: Tensor
    first: Tensor
    second: Tensor

    def of_degree(self, degree: int) -> Tensor:
        """The moment of degree 1 or 2 in the gradient."""
        return self.first if degree == 1 else self.second

    def reset(self, later: Expansions) -> None:
        """Starts anew, once ``later`` is through."""
        for tensor in (self.step, self.first, self.second):
            later.zero(tensor)


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
    old: LanguageModel,
    new: LanguageModel,
    old_moments: Mapping[str, Moments],
    new_moments: Mapping[str, Moments],
) -> Traffic:
    """Fills ``new`` and its moments from ``old``, parameter by parameter.

    Every rank maps its own shards. Where a cut does not align with a map, the old parameter concerned is gathered,
    one tensor at a time. What changes its pipeline stage goes from rank to rank, one tensor at a time, too.
    """
    source = _Shards(old, old_moments)
    alignment = Alignment(source.parameters, Layout(old.grid.tp_size, old.grid.size("shard")))
    owners, me = _owners(new), new.grid.rank("pp")
    traffic = Traffic()
    parameters = dict(new.named_parameters())
    planner = TensorPlanner(plan)
    with Expansions() as later:
        for name, spec in whole_specs(new).items():
            growth = planner(name, spec)
            recut, before = alignment.recut(growth), traffic.received
            if recut:
                traffic.recut.append(name)
            bounds, to = my_bounds(spec, growth.shape, new.grid), owners[name]
            needs = growth.needs(bounds)
            blocks = {key: source.weight(key, needs[key], key in recut, to, traffic) for key in growth.reads}
            if to == me:
                mine = {key: block for key, block in blocks.items() if block is not None}
                grow_weight(growth, mine, bounds, local_tensor(parameters[name]), later)
            blocks.clear()
            state = new_moments[name] if to == me else None
            if growth.source is None or growth.moments == "reset":
                if state is not None:
                    state.reset(later)
            else:
                key = growth.source
                for degree in (1, 2):
                    block = source.moment(key, degree, needs[key], key in recut, to, traffic)
                    if state is not None and block is not None:
                        grow_moment(growth, block, bounds, state.of_degree(degree), degree, later)
                step = source.step(key, to, traffic)
                if state is not None and step is not None:
                    state.step.copy_(step)
            if traffic.received > before or growth.treatment.fold is not None:
                later.finish()  # and let go of what was received or computed for this one
    _grow_norm_stats(plan, old, new)
    return traffic


def whole_specs(model: LanguageModel) -> dict[str, ParamSpec]:
    """The declaration of every parameter of the whole model, by name, whatever part of it is here."""
    return declarations(model.spec) if model.grid.pipeline_stages > 1 else dict(named_specs(model))


def _owners(model: LanguageModel) -> dict[str, int]:
    """The pipeline coordinate of the ranks that hold each parameter (of a tied table: the original)."""
    parts = stage_parts(model.spec, model.grid)
    return {name: model.grid.rank_of_stage(stage_of(name, parts)) for name in whole_specs(model)}


class _Shards:
    """The old model's shards, gathered where they must be, sent where another pipeline rank needs them."""

    def __init__(self, model: LanguageModel, moments: Mapping[str, Moments]) -> None:
        self.grid = model.grid
        self.moments = moments
        self.tensors: dict[str, Tensor] = dict(model.named_parameters())
        self.owners = _owners(model)
        specs = whole_specs(model)
        shapes = {name: spec.shape(model.sizes) for name, spec in specs.items()}
        self.parameters = OldParameters(specs, shapes)
        self.bounds = {name: my_bounds(specs[name], shapes[name], self.grid) for name in self.tensors if name in specs}
        first = next(iter(self.tensors.values()))
        self.dtype, self.device = first.dtype, first.device

    def weight(self, name: str, needed: Bounds, gather: bool, to: int, traffic: Traffic) -> Block | None:
        """A block of an old parameter on the pipeline rank ``to``; elsewhere ``None``."""
        local = local_tensor(self.tensors[name]) if name in self.tensors else None
        return self._block(name, local, needed, gather, to, traffic)

    def moment(self, name: str, degree: int, needed: Bounds, gather: bool, to: int, traffic: Traffic) -> Block | None:
        """The same of Adam's first or second moment."""
        state = self.moments.get(name)
        local = None if state is None else state.of_degree(degree)
        return self._block(name, local, needed, gather, to, traffic)

    def step(self, name: str, to: int, traffic: Traffic) -> Tensor | None:
        """The number of updates of an old parameter."""
        state = self.moments.get(name)
        like = torch.empty((), dtype=torch.float32, device=self.device)
        return self._passed(None if state is None else state.step, like, self.owners[name], to, traffic)

    def _block(
        self, name: str, local: Tensor | None, needed: Bounds, gather: bool, to: int, traffic: Traffic
    ) -> Block | None:
        owner, me = self.owners[name], self.grid.rank("pp")
        if me not in (owner, to):
            return None
        if owner != to and any(start == stop for start, stop in needed):  # all of it is new there: nothing to send
            shape = [stop - start for start, stop in needed]
            return Block(torch.empty(shape, dtype=self.dtype, device=self.device), needed) if to == me else None
        if owner == me and local is not None:
            block = _narrowed(self._own(name, local, gather, traffic), needed)
            if to == me:
                return block
            self._passed(block.values, block.values, owner, to, traffic)
            return None
        shape = [stop - start for start, stop in needed]
        received = self._passed(None, torch.empty(shape, dtype=self.dtype, device=self.device), owner, to, traffic)
        return None if received is None else Block(received, needed)

    def _own(self, name: str, local: Tensor, gather: bool, traffic: Traffic) -> Block:
        """This rank's shard of a tensor laid out as the parameter ``name``, or all of it."""
        like = self.tensors[name]
        if not gather or not isinstance(like, DTensor):
            return Block(local, self.bounds[name])
        shard = DTensor.from_local(
            local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
        traffic.received += (like.numel() - local.numel()) * like.element_size()
        return Block(shard.full_tensor(), tuple((0, size) for size in self.parameters.shapes[name]))

    def _passed(self, mine: Tensor | None, like: Tensor, owner: int, to: int, traffic: Traffic) -> Tensor | None:
        """A tensor of one pipeline rank on another, received into ``like``."""
        me = self.grid.rank("pp")
        if owner == to:
            return mine if me == to else None
        if me == owner and mine is not None:
            dist.send(mine.contiguous(), group=self.grid.group("pp"), group_dst=to)
        if me != to:
            return None
        dist.recv(like, group=self.grid.group("pp"), group_src=owner)
        traffic.received += like.nbytes
        return like


def _narrowed(block: Block, needed: Bounds) -> Block:
    if needed == block.bounds or any(start == stop for start, stop in needed):
        return block
    values = block.values
    for dim, ((low, _), (start, stop)) in enumerate(zip(block.bounds, needed, strict=True)):
        values = values.narrow(dim, start - low, stop - start)
    return Block(values, needed)


def _grow_norm_stats(plan: GrowthPlan, old: LanguageModel, new: LanguageModel) -> None:
    """Statistics' weights: a unit's weight is shared by its copies (growth.md, 1.1)."""
    weights = old.norm_stats
    if weights is None:
        weights = torch.full((plan.old.embed,), 1.0 / plan.old.embed, dtype=torch.float64)
    for part in new.parts:
        if part.norm_stats is not None:
            part.norm_stats.copy_(grown_norm_stats(plan, weights.cpu()))


def grown_norm_stats(plan: GrowthPlan, weights: Tensor) -> Tensor:
    """The statistics' weights ``[D']`` after growth, from those before (fp64 ``[D]``)."""
    embed = plan.maps.get(Axis.EMBED)
    return weights if embed is None else weights[embed.index] / embed.counts
