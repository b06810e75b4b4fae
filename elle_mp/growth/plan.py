"""The plan of one growth: what maps to what, and whether the function stays exactly the same."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from elle_mp.axes import Axis
from elle_mp.config import GrowthConfig, ModelConfig
from elle_mp.errors import UserError
from elle_mp.growth.maps import AxisMap, floor_map, random_map, slot_map
from elle_mp.models.spec import ModelSpec, sizes_of

PAPER_NOISE_STD = 0.01
"""Standard deviation of the noise on copies in the paper's code (elle.md, 1.6)."""


@dataclass(frozen=True)
class GrowthPlan:
    """From one model to a larger one.

    Attributes:
        old, new: the models.
        width, depth: the strategies chosen (``auto`` resolved).
        layer_source: for each new layer, the old layer it copies.
        inserted: for each new layer, whether it is an added copy (the identity at first, unless duplicated).
        maps: index maps of the axes that grow, the same in all layers.
        layer_maps: per new layer, maps of its own (the paper draws fresh ones); they override ``maps``.
        moments: ``scaled`` or ``reset``.
        noise_db: signal-to-noise ratio of the zero-sum noise, or ``None``.
        seed: of the noise.
        exact: whether the function is preserved to rounding; ``reason`` says why not.
    """

    old: ModelSpec
    new: ModelSpec
    width: str
    depth: str
    layer_source: tuple[int, ...]
    inserted: tuple[bool, ...]
    maps: Mapping[Axis, AxisMap]
    layer_maps: tuple[Mapping[Axis, AxisMap], ...]
    moments: str
    noise_db: float | None
    seed: int
    exact: bool
    reason: str | None = field(default=None)

    @property
    def duplicates_layers(self) -> bool:
        """Whether added layers keep computing what their source computes (never exact)."""
        return self.depth == "elle"

    def source(self, name: str) -> tuple[str, int | None]:
        """The old parameter behind a new one, and the new layer it lies in."""
        parts = name.split(".")
        if parts[0] != "layers":
            return name, None
        layer = int(parts[1])
        return ".".join(["layers", str(self.layer_source[layer]), *parts[2:]]), layer

    def maps_of(self, layer: int | None) -> Mapping[Axis, AxisMap]:
        """The index maps that hold in a layer, or outside all of them (``None``)."""
        return self.maps if layer is None else {**self.maps, **self.layer_maps[layer]}

    def to_json(self) -> dict[str, Any]:
        """What a growth record and a checkpoint keep of the plan."""
        keys = ("layers", "heads", "kv_groups", "embed", "mlp")
        return {
            "width": self.width,
            "depth": self.depth,
            "moments": self.moments,
            "noise_db": self.noise_db,
            "seed": self.seed,
            "exact": self.exact,
            "reason": self.reason,
            "from": {key: getattr(self.old, key) for key in keys},
            "to": {key: getattr(self.new, key) for key in keys},
            "layer_source": list(self.layer_source),
            "inserted": [index for index, added in enumerate(self.inserted) if added],
        }


def make_plan(old: ModelSpec, sizes: ModelConfig, growth: GrowthConfig, seed: int, where: str = "growth") -> GrowthPlan:
    """Plans the growth of ``old`` to the sizes of the next stage.

    Raises:
        UserError: a strategy that the configuration names cannot grow this family by these sizes.
    """
    target = replace(old, **sizes_of(sizes))
    width, width_reason = _choose_width(old, target, growth.width, where)
    depth, depth_reason = _choose_depth(old, target, growth.depth, where)
    maps, layer_maps, numbers = _maps(old, target, width, seed)
    layer_source, inserted, target = _place_layers(old, target, depth, numbers)
    embed = maps.get(Axis.EMBED)
    weighted = old.weighted_norms or (width == "weighted" and embed is not None and not embed.uniform)
    eps = old.norm_eps * (embed.eta**2 if embed is not None else 1.0)
    inexact = [reason for reason in (width_reason, depth_reason) if reason]
    moments = growth.moments
    if moments == "auto":
        moments = "reset" if "elle" in (width, depth) else "scaled"
    if sizes_of(sizes) == {key: getattr(old, key) for key in sizes_of(sizes)}:
        moments = "scaled"  # A stage without growth goes on with its optimizer, whatever growth would have done.
    return GrowthPlan(
        old=old,
        new=replace(target, weighted_norms=weighted, norm_eps=eps),
        width=width,
        depth=depth,
        layer_source=layer_source,
        inserted=inserted,
        maps=maps,
        layer_maps=layer_maps,
        moments=moments,
        noise_db=growth.noise_db,
        seed=seed,
        exact=not inexact,
        reason="; ".join(inexact) or None,
    )


def _choose_width(old: ModelSpec, new: ModelSpec, wanted: str, where: str) -> tuple[str, str | None]:
    """The strategy of the residual axis, and why it is not exact."""
    same = all(getattr(old, key) == getattr(new, key) for key in ("kv_groups", "queries", "embed", "mlp"))
    divides = new.embed % old.embed == 0
    if wanted == "elle":
        return (
            "elle",
            None if same else "growth.width elle: random maps under plain norm statistics, and copy noise",
        )
    if wanted == "auto":
        wanted = "replicate" if divides else "iso" if old.rms_norm else "weighted"
    sizes = f"width {old.embed} -> {new.embed}"
    if wanted == "replicate" and not divides:
        other = "iso" if old.rms_norm else "weighted"
        raise UserError(f"{where}.width=replicate: {sizes} is no whole multiple; {other} is exact there")
    if wanted == "iso" and not old.rms_norm:
        raise UserError(
            f"{where}.width=iso is exact for RMSNorm only, and {old.family} has LayerNorm; weighted would do"
        )
    if wanted == "weighted" and old.rms_norm:
        raise UserError(f"{where}.width=weighted is for LayerNorm, and {old.family} has RMSNorm; iso would do")
    return wanted, None


def _choose_depth(old: ModelSpec, new: ModelSpec, wanted: str, where: str) -> tuple[str, str | None]:
    """The strategy of inserted layers, and why it is not exact."""
    fitting = "zero_out" if old.pre_norm else "gate"
    if wanted == "elle":
        added = new.layers - old.layers
        if added > old.layers - len(old.duplicated) and added:
            raise UserError(
                f"{where}.depth=elle duplicates each layer once per doubling: "
                f"{old.layers - len(old.duplicated)} are left, not {added}; "
                f"at most {2 * old.layers - len(old.duplicated)} layers would do"
            )
        return "elle", "growth.depth elle: duplicated layers are not the identity" if added else None
    if wanted not in ("auto", fitting):
        kind = "pre-norm" if old.pre_norm else "post-LN"
        raise UserError(f"{where}.depth={wanted} is not exact for {old.family} ({kind}); {fitting} is")
    return fitting, None


def _maps(
    old: ModelSpec, new: ModelSpec, width: str, seed: int
) -> tuple[dict[Axis, AxisMap], tuple[dict[Axis, AxisMap], ...], random.Random]:
    """Maps shared by all layers, maps of each layer's own, and the generator that chooses layers after them."""
    chooser = random.Random(seed)
    if width != "elle":
        maps = {
            Axis.EMBED: floor_map(old.embed, new.embed, isometric=width == "iso"),
            Axis.KV_GROUPS: floor_map(old.kv_groups, new.kv_groups),
            Axis.MLP: floor_map(old.mlp, new.mlp),
            Axis.QUERIES: (queries := floor_map(old.queries, new.queries)),
            Axis.SLOT: slot_map(queries),
        }
        return _moving(maps), ({},) * new.layers, chooser
    drawn = np.random.RandomState(seed)
    shared = {
        Axis.EMBED: random_map(old.embed, new.embed, drawn),
        Axis.QUERIES: (queries := floor_map(old.queries, new.queries)),
        Axis.SLOT: slot_map(queries),
    }
    layers = []
    for _ in range(new.layers):
        heads = random_map(old.kv_groups, new.kv_groups, drawn)
        layers.append(_moving({Axis.KV_GROUPS: heads, Axis.MLP: random_map(old.mlp, new.mlp, drawn)}))
    return _moving(shared), tuple(layers), chooser


def _moving(maps: dict[Axis, AxisMap]) -> dict[Axis, AxisMap]:
    return {axis: item for axis, item in maps.items() if not item.identity}


def _place_layers(
    old: ModelSpec, new: ModelSpec, depth: str, chooser: random.Random
) -> tuple[tuple[int, ...], tuple[bool, ...], ModelSpec]:
    """Sources of the new layers, which of them are added, and the spec with its layers' bookkeeping."""
    duplicated = old.duplicated
    if depth == "elle":
        candidates = [lineage for lineage in dict.fromkeys(old.lineage) if lineage not in duplicated]
        chosen = chooser.sample(candidates, new.layers - old.layers)
        duplicated = (*duplicated, *chosen)
        source = [layer for layer in range(old.layers) for _ in range(1 + (old.lineage[layer] in chosen))]
    else:
        source = [layer * old.layers // new.layers for layer in range(new.layers)]
    inserted = [index > 0 and source[index] == source[index - 1] for index in range(new.layers)]
    lineage = tuple(old.lineage[layer] for layer in source)
    if depth != "elle" or new.layers % (max(lineage) + 1) == 0:
        lineage, duplicated = (tuple(range(new.layers)), ()) if new.layers != old.layers else (lineage, duplicated)
    gated = tuple(
        index for index in range(new.layers) if (inserted[index] and depth == "gate") or source[index] in old.gated
    )
    return tuple(source), tuple(inserted), replace(new, gated=gated, lineage=lineage, duplicated=duplicated)
