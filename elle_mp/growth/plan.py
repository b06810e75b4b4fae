"""The plan of one growth: what maps to what, and whether the function stays exactly the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from elle_mp.axes import Axis
from elle_mp.config import GrowthConfig, ModelConfig
from elle_mp.errors import UserError
from elle_mp.growth import depth as depths
from elle_mp.growth import width as widths
from elle_mp.growth.depth import DepthStrategy, Placement, Treatment
from elle_mp.growth.maps import AxisMap, Fill, appended_map, head_dim_map
from elle_mp.growth.registry import strategy
from elle_mp.growth.width import WidthStrategy
from elle_mp.models.spec import ModelSpec, sizes_of

SIZES = ("layers", "embed", "kv_groups", "queries", "head_dim", "mlp", "positions", "vocab_size")
"""What growth changes, as fields of :class:`ModelSpec`."""


@dataclass(frozen=True)
class GrowthPlan:
    """From one model to a larger one.

    Attributes:
        old, new: the models.
        width, depth: the strategies chosen (``auto`` resolved).
        placement: where the new layers come from.
        maps: index maps of the axes that grow, the same in all layers.
        layer_maps: per new layer, maps of its own (the paper draws fresh ones); they override ``maps``.
        moments: ``scaled``, ``asym_reset`` or ``reset``.
        rate: ``keep``, ``mup``, ``rewarm`` or ``asym_rewarm``.
        noise_db: signal-to-noise ratio of the zero-sum noise, or ``None``.
        seed: of noise and random values.
        exact: whether the function is preserved to rounding; ``reason`` says why not.
    """

    old: ModelSpec
    new: ModelSpec
    width: str
    depth: str
    placement: Placement
    maps: Mapping[Axis, AxisMap]
    layer_maps: tuple[Mapping[Axis, AxisMap], ...]
    moments: str
    rate: str
    noise_db: float | None
    seed: int
    reason: str | None = None

    @property
    def exact(self) -> bool:
        """Whether no logit changes beyond rounding."""
        return self.reason is None

    @property
    def unchanged(self) -> bool:
        """Whether the larger model is the old one."""
        return not self.maps and not any(self.layer_maps) and self.old.layers == self.new.layers

    @property
    def layer_source(self) -> tuple[int, ...]:
        """For each new layer, the old layer it copies."""
        return self.placement.source

    @property
    def inserted(self) -> tuple[bool, ...]:
        """For each new layer, whether it is an added copy."""
        return self.placement.inserted

    @property
    def width_strategy(self) -> WidthStrategy:
        return strategy(WidthStrategy, self.width, "growth.width")

    @property
    def depth_strategy(self) -> DepthStrategy:
        return strategy(DepthStrategy, self.depth, "growth.depth")

    def locate(self, name: str) -> tuple[int | None, str]:
        """The new layer that a parameter lies in, and its name there; ``None`` and the whole name outside."""
        if not name.startswith("layers."):
            return None, name
        _, layer, suffix = name.split(".", 2)
        return int(layer), suffix

    def treatment(self, layer: int | None, suffix: str) -> Treatment:
        """What the depth strategy does to a parameter."""
        return Treatment() if layer is None else self.depth_strategy.treat(self.placement, layer, suffix)

    def maps_of(self, layer: int | None) -> Mapping[Axis, AxisMap]:
        """The index maps that hold in a layer, or outside all of them (``None``)."""
        return self.maps if layer is None else {**self.maps, **self.layer_maps[layer]}

    def then(self, later: GrowthPlan) -> GrowthPlan:
        """One plan that does what this one followed by ``later`` does.

        Raises:
            ValueError: the second does not start where the first ends, or growing twice cannot be said in one plan: one
                draws noise or random values, takes values from other units, or joins copies one to one.
        """
        _check_composes(self, later)
        source = tuple(self.layer_source[layer] for layer in later.layer_source)
        inserted = tuple(
            added or self.inserted[layer] for added, layer in zip(later.inserted, later.layer_source, strict=True)
        )
        return replace(
            later,
            old=self.old,
            width=self.width if self.width == later.width else f"{self.width}+{later.width}",
            placement=replace(later.placement, source=source, inserted=inserted),
            maps=_composed(self.maps, later.maps),
            layer_maps=tuple(
                _composed(self.layer_maps[layer], own)
                for own, layer in zip(later.layer_maps, later.layer_source, strict=True)
            ),
            reason="; ".join(reason for reason in (self.reason, later.reason) if reason) or None,
        )

    def summary(self) -> dict[str, Any]:
        """What a growth record says of the plan: sizes, strategies, verdict."""
        keys = ("layers", "heads", "kv_groups", "head_dim", "embed", "mlp", "positions", "vocab_size")
        return {
            "width": self.width,
            "depth": self.depth,
            "moments": self.moments,
            "rate": self.rate,
            "noise_db": self.noise_db,
            "seed": self.seed,
            "exact": self.exact,
            "reason": self.reason,
            "from": {key: getattr(self.old, key) for key in keys},
            "to": {key: getattr(self.new, key) for key in keys},
            "layer_source": list(self.layer_source),
            "inserted": [index for index, added in enumerate(self.inserted) if added],
        }

    def to_json(self) -> dict[str, Any]:
        """The whole plan in plain values, for the lineage in a checkpoint; :meth:`from_json` is its inverse."""
        return {
            **{key: getattr(self, key) for key in ("width", "depth", "moments", "rate", "noise_db", "seed", "reason")},
            "old": self.old.to_json(),
            "new": self.new.to_json(),
            "placement": {key: list(value) for key, value in vars(self.placement).items()},
            "maps": _maps_to_json(self.maps),
            "layer_maps": [_maps_to_json(maps) for maps in self.layer_maps] if any(self.layer_maps) else [],
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> GrowthPlan:
        """The plan that :meth:`to_json` was made of."""
        new = ModelSpec.from_json(fields["new"])
        layer_maps: Sequence[Mapping[str, Any]] = fields["layer_maps"] or [{}] * new.layers
        plain = {key: fields[key] for key in ("width", "depth", "moments", "rate", "noise_db", "seed", "reason")}
        return cls(
            old=ModelSpec.from_json(fields["old"]),
            new=new,
            placement=Placement(**{key: tuple(value) for key, value in fields["placement"].items()}),
            maps=_maps_from_json(fields["maps"]),
            layer_maps=tuple(_maps_from_json(maps) for maps in layer_maps),
            **plain,
        )


def make_plan(old: ModelSpec, sizes: ModelConfig, growth: GrowthConfig, seed: int) -> GrowthPlan:
    """Plans the growth of ``old`` to the sizes of the next stage.

    Raises:
        UserError: a size shrinks, or a strategy that the configuration names cannot grow this family so.
    """
    target = replace(old, **sizes_of(sizes))
    check_larger(old, target)
    width_name = widths.automatic(old, target) if growth.width == "auto" else growth.width
    depth_name = depths.automatic(old) if growth.depth == "auto" else growth.depth
    width = strategy(WidthStrategy, width_name, "growth.width")
    depth = strategy(DepthStrategy, depth_name, "growth.depth")
    reasons = [reason for reason in (width.reason(old, target), depth.reason(old, target)) if reason]
    drawn = width.maps(old, target, seed)
    maps = _moving(drawn.shared | _other_maps(old, target))
    layer_maps = tuple(_moving(item) for item in drawn.layers)
    placement = depth.place(old, target, seed)
    same = not maps and not any(layer_maps) and old.layers == target.layers
    return GrowthPlan(
        old=old,
        new=_grown_spec(old, target, width, depth, placement, maps.get(Axis.EMBED)),
        width=width_name,
        depth=depth_name,
        placement=placement,
        maps=maps,
        layer_maps=layer_maps,
        moments=_moments(old, target, width, depth, growth, same),
        rate=width.rate if growth.rate == "auto" else growth.rate,
        noise_db=growth.noise_db,
        seed=seed,
        reason="; ".join(reasons) or None,
    )


def check_larger(old: ModelSpec, new: ModelSpec) -> None:
    """Refuses a model that is smaller anywhere.

    Raises:
        UserError: names the size.
    """
    for key in SIZES:
        before, after = getattr(old, key), getattr(new, key)
        if after < before:
            raise UserError(f"growth: {key} {before} -> {after} would shrink; a model only grows, so at least {before}")


def _other_maps(old: ModelSpec, new: ModelSpec) -> dict[Axis, AxisMap]:
    """Axes that no width strategy maps: longer heads, more positions, more rows of the table."""
    maps = {}
    if new.head_dim != old.head_dim:
        maps[Axis.HEAD_DIM] = head_dim_map(old.head_dim, new.head_dim, old.rotary)
    if new.positions != old.positions:
        maps[Axis.POSITIONS] = appended_map(old.positions, new.positions, Fill.TILE)
    if new.padded_vocab != old.padded_vocab:
        maps[Axis.VOCAB] = appended_map(old.padded_vocab, new.padded_vocab, Fill.RANDOM)
    return maps


def _grown_spec(
    old: ModelSpec,
    target: ModelSpec,
    width: WidthStrategy,
    depth: DepthStrategy,
    placement: Placement,
    embed: AxisMap | None,
) -> ModelSpec:
    """The larger model, with all that growth leaves in it."""
    gated = tuple(
        layer
        for layer, (source, added) in enumerate(zip(placement.source, placement.inserted, strict=True))
        if source in old.gated or (added and depth.gated)
    )
    exponents = old.rope_exponents
    if old.rotary and target.head_dim != old.head_dim:
        kept = exponents or tuple(pair / old.head_dim for pair in range(0, old.head_dim, 2))
        added_pairs = (target.head_dim - old.head_dim) // 2
        exponents = (*kept, *((pair + 0.5) / added_pairs for pair in range(added_pairs)))
    return replace(
        target,
        weighted_norms=width.weighted(old, target),
        norm_eps=old.norm_eps * (embed.eta**2 if embed is not None else 1.0),
        gated=gated,
        lineage=placement.lineage,
        duplicated=placement.duplicated,
        rope_exponents=exponents,
        live_vocab=old.softmax_vocab if target.vocab_size != old.vocab_size else old.live_vocab,
    )


def _moments(
    old: ModelSpec, new: ModelSpec, width: WidthStrategy, depth: DepthStrategy, growth: GrowthConfig, same: bool
) -> str:
    """What ``auto`` is with these strategies; a stage without growth always goes on with its optimizer."""
    if same:
        return "scaled"
    if growth.moments != "auto":
        return growth.moments
    wanted = {
        width.moments if widths.grows(old, new) else "scaled",
        depth.moments if old.layers != new.layers else "scaled",
    }
    return next(name for name in ("reset", "asym_reset", "scaled") if name in wanted)


def _moving(maps: Mapping[Axis, AxisMap]) -> dict[Axis, AxisMap]:
    return {axis: item for axis, item in maps.items() if not item.identity}


def _check_composes(first: GrowthPlan, second: GrowthPlan) -> None:
    if second.old != first.new:
        raise ValueError("the second growth starts from another model")
    if first.noise_db is not None or second.noise_db is not None:
        raise ValueError("noise is drawn at each growth: growths with noise do not compose")
    if (first.depth, first.moments, first.rate) != (second.depth, second.moments, second.rate):
        raise ValueError("growths of different depth, moments or rate strategies do not compose")
    for plan in (first, second):
        maps = [item for each in (plan.maps, *plan.layer_maps) for item in each.values()]
        noisy = "+" not in plan.width and plan.width_strategy.copy_noise is not None
        if (noisy and maps) or not all(item.deterministic for item in maps):
            raise ValueError(f"growth by {plan.width} draws values or takes them from elsewhere: it does not compose")
    added = first.old.layers != first.new.layers and second.old.layers != second.new.layers
    if added and not first.depth_strategy.composes:
        raise ValueError(f"layers added by {first.depth} twice depend on those added first: they do not compose")


def _composed(first: Mapping[Axis, AxisMap], second: Mapping[Axis, AxisMap]) -> dict[Axis, AxisMap]:
    out = dict(first)
    for axis, item in second.items():
        out[axis] = first[axis].then(item) if axis in first else item
    return out


def _maps_to_json(maps: Mapping[Axis, AxisMap]) -> dict[str, Any]:
    return {axis.value: item.to_json() for axis, item in maps.items()}


def _maps_from_json(fields: Mapping[str, Any]) -> dict[Axis, AxisMap]:
    return {Axis(axis): AxisMap.from_json(item) for axis, item in fields.items()}
