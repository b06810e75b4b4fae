"""How one parameter grows: what its entries copy, their scales, what else stands there (growth.md, 1.1 and 1.3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from elle_mp.axes import Axis, Dim, ParamSpec, Role
from elle_mp.growth.depth import Treatment
from elle_mp.growth.indices import Known
from elle_mp.growth.maps import AxisMap, Fill, dim_map
from elle_mp.growth.plan import GrowthPlan
from elle_mp.ops.random import Bounds


@dataclass(frozen=True)
class DimGrowth:
    """How one dimension of a parameter grows; all tensors ``[N']``.

    Attributes:
        item: the map of the dimension.
        scale: fp64, the factor ``s`` of each entry's weight.
        ratio: fp64, the factor ``r = 1 / (n s)`` of each entry's gradient.
        fill: int8, :class:`Fill`.
    """

    item: AxisMap
    scale: Tensor
    ratio: Tensor
    fill: Tensor

    @cached_property
    def number(self) -> Tensor:
        """Which copy of its unit an entry is; int64."""
        return self.item.number

    @cached_property
    def fills(self) -> frozenset[Fill]:
        """What its units are filled with."""
        return frozenset(Fill(value) for value in self.fill.unique().tolist())

    def has(self, fill: Fill) -> bool:
        """Whether some unit is filled so."""
        return fill in self.fills

    def source_range(self, start: int, stop: int) -> tuple[int, int]:
        """The old units that the new ones ``[start, stop)`` are made of."""
        if (start, stop) not in self._ranges:
            self._ranges[start, stop] = self._source_range(start, stop)
        return self._ranges[start, stop]

    @cached_property
    def _ranges(self) -> dict[tuple[int, int], tuple[int, int]]:
        return {}

    def _source_range(self, start: int, stop: int) -> tuple[int, int]:
        if start == stop:
            return 0, 0
        if bool((self.fill[start:stop] == int(Fill.MEAN)).any()):
            return 0, self.item.old
        part = self.item.index[start:stop]
        return int(part.min()), int(part.max()) + 1


@dataclass(frozen=True)
class TensorGrowth:
    """How one parameter grows.

    Attributes:
        name, spec, shape: of the new parameter.
        source, old_shape: of the old one; ``source`` is ``None`` for a parameter that is new altogether.
        above: the parameter one layer above the source, where some units come from it.
        dims: per dimension, ``None`` where nothing moves.
        treatment: what the depth strategy does to it.
        pick: copies read one copy each (block-diagonal).
        noise: strength of the zero-sum noise on the last dimension, relative to each value, or ``None``.
        copy_noise: standard deviation of noise on copies that does not cancel, or ``None``.
        stream: what the noise is keyed by, with the plan's seed.
        seed: of the plan.
        moments: of the plan; ``reset`` where Adam starts anew.
        old_width: channels of the old residual stream.
        known: what the growths of one plan found out about blocks alike.
    """

    name: str
    spec: ParamSpec
    shape: tuple[int, ...]
    source: str | None
    old_shape: tuple[int, ...]
    above: str | None
    dims: tuple[DimGrowth | None, ...]
    treatment: Treatment
    pick: bool
    noise: float | None
    copy_noise: float | None
    stream: str
    seed: int
    moments: str
    old_width: int
    known: Known = field(default_factory=Known, repr=False, compare=False)

    @property
    def reads(self) -> tuple[str, ...]:
        """The old parameters that it is made of."""
        names = [self.source, self.above, *(self.treatment.fold or ()), self.folded_weight]
        return tuple(name for name in names if name is not None)

    @property
    def folded_weight(self) -> str | None:
        """The matrix whose bias this is, when a norm's bias is folded into it."""
        if self.treatment.fold is None or self.source is None or not self.source.endswith("_bias"):
            return None
        return self.source.removesuffix("bias") + "weight"

    def needs(self, bounds: Bounds) -> dict[str, Bounds]:
        """The blocks of old parameters that the block ``bounds`` of the new one is made of."""
        if self.source is None:
            return {}
        block = tuple(
            (start, stop) if item is None else item.source_range(start, stop)
            for item, (start, stop) in zip(self.dims, bounds, strict=True)
        )
        out = {self.source: block}
        if self.above is not None:
            out[self.above] = block
        for name in self.treatment.fold or ():
            out[name] = ((0, self.old_width),)
        if self.folded_weight is not None:
            out[self.folded_weight] = (block[0], (0, self.old_width))
        return out


class TensorPlanner:
    """Turns a plan into the growth of each parameter; maps of dimensions that repeat are made once."""

    def __init__(self, plan: GrowthPlan) -> None:
        self.plan = plan
        self._known: dict[tuple[Dim, int | None, bool], DimGrowth | None] = {}
        width = plan.width_strategy if "+" not in plan.width else None
        self._alike: dict[tuple[ParamSpec, bool, int | None, bool], TensorGrowth] = {}
        self._axes, self._old_axes = plan.new.axes, plan.old.axes
        self._shared = Known()
        self._copy_noise = width.copy_noise if width is not None else None

    def __call__(self, name: str, spec: ParamSpec) -> TensorGrowth:
        """What the plan does to the new parameter ``name``."""
        plan = self.plan
        layer, suffix = plan.locate(name)
        treatment = plan.treatment(layer, suffix)
        source, above = name, None
        if layer is not None:
            from_layer = plan.layer_source[layer]
            source = f"layers.{from_layer}.{suffix}"
            if from_layer + 1 < plan.old.layers:
                above = f"layers.{from_layer + 1}.{suffix}"
        own = layer if layer is not None and plan.layer_maps[layer] else None
        like = self._like(spec, layer, own, above is not None)
        return replace(
            like,
            name=name,
            source=None if treatment.constant is not None else source,
            above=above if any(item is not None and item.has(Fill.NEXT) for item in like.dims) else None,
            treatment=treatment,
            stream=f"growth/{plan.new.layers}x{plan.new.embed}x{plan.new.mlp}/{name}",
            moments="reset" if treatment.fresh else plan.moments,
        )

    def _like(self, spec: ParamSpec, layer: int | None, own: int | None, has_above: bool) -> TensorGrowth:
        """What is the same for a parameter of many layers; the rest is left open."""
        key = (spec, layer is None, own, has_above)
        found = self._alike.get(key)
        if found is None:
            found = self._alike[key] = self._first_like(spec, layer, own, has_above)
        return found

    def _first_like(self, spec: ParamSpec, layer: int | None, own: int | None, has_above: bool) -> TensorGrowth:
        plan = self.plan
        dims = [self._dim(dim, layer, own, has_above) for dim in spec.dims]
        pick = len(dims) == 2 and all(item is not None and item.item.pick for item in dims)
        if pick:
            dims[1] = _picked(dims[1])
        last = dims[-1]
        noisy = spec.dims[-1].role is Role.READ and last is not None and bool((last.item.counts > 1).any())
        strength = None if plan.noise_db is None else 10.0 ** (-plan.noise_db / 20.0)
        return TensorGrowth(
            name="",
            spec=spec,
            shape=spec.shape(self._axes),
            source=None,
            old_shape=spec.shape(self._old_axes),
            above=None,
            dims=tuple(dims),
            treatment=Treatment(),
            pick=pick,
            noise=strength if noisy and self._copy_noise is None else None,
            copy_noise=self._copy_noise if noisy else None,
            stream="",
            seed=plan.seed,
            moments=plan.moments,
            old_width=self._old_axes[Axis.EMBED],
            known=self._shared,
        )

    def _dim(self, dim: Dim, layer: int | None, own: int | None, has_above: bool) -> DimGrowth | None:
        key = (dim, own, has_above)
        if key not in self._known:
            item = dim_map(dim, self.plan.maps_of(layer), self._old_axes)
            self._known[key] = None if item is None else _dim_growth(dim.role, item, has_above)
        return self._known[key]


def _dim_growth(role: Role, item: AxisMap, has_above: bool) -> DimGrowth:
    ones = torch.ones_like(item.counts)
    written = item.written
    if role is not Role.WRITE or not has_above:
        written = torch.where(written == int(Fill.NEXT), 0, written).to(torch.int8)
    copied = torch.zeros_like(written)
    silent = torch.where(written > int(Fill.NEXT), int(Fill.ZERO), 0).to(torch.int8)
    scale, fill = {
        Role.WRITE: (item.write, written),
        Role.KEEP: (item.write, written),
        Role.READ: (item.read, item.reads),
        Role.GAIN: (item.eta / item.write, copied),
        Role.BIAS: (ones, silent),
        Role.HEAD_GAIN: (item.eta * item.read / item.write.square(), copied),
        Role.HEAD_BIAS: (item.read / item.write, silent),
        Role.COPY: (ones, copied),
    }[role]
    scale = torch.where(fill == int(Fill.ZERO), 0.0, scale)
    return DimGrowth(item, scale, _ratio(scale, item.counts, fill), fill)


def _ratio(scale: Tensor, counts: Tensor, fill: Tensor) -> Tensor:
    """``1 / (n s)`` of copies; zero of everything else, where Adam starts anew."""
    return torch.where(fill == int(Fill.COPY), 1.0 / (counts * scale), 0.0)


def _picked(item: DimGrowth | None) -> DimGrowth | None:
    """A read dimension whose copies are not shared but chosen among: each source entry has one reader per writer."""
    if item is None:
        return None
    ones = torch.ones_like(item.scale)
    return replace(item, scale=ones, ratio=ones)


def moment_factor(item: DimGrowth, moments: str, degree: int) -> Tensor:
    """The factor of each entry's moment of ``degree`` 1 or 2 in the gradient, fp64 ``[N']``."""
    ratio = item.ratio.pow(degree)
    return torch.where(item.item.original, ratio, 0.0) if moments == "asym_reset" else ratio


def parameter_growths(plan: GrowthPlan, specs: Mapping[str, ParamSpec]) -> dict[str, TensorGrowth]:
    """The growth of every parameter of the larger model, whose declarations are ``specs``."""
    planner = TensorPlanner(plan)
    return {name: planner(name, spec) for name, spec in specs.items()}
