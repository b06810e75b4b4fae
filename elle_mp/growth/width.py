"""The catalogue of width strategies: how embed, heads, groups and MLP units are mapped (growth.md, section 4).

A strategy is a class; adding one is writing it here. ``growth.width`` names it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch

from elle_mp.axes import Axis
from elle_mp.errors import UserError
from elle_mp.growth.maps import AxisMap, Fill, floor_map, random_map, slot_map
from elle_mp.models.spec import ModelSpec

Maps = dict[Axis, AxisMap]


@dataclass(frozen=True)
class WidthMaps:
    """Maps that all layers share, and maps of each new layer's own."""

    shared: Maps
    layers: tuple[Maps, ...]


class WidthStrategy:
    """Copies units by the floor map; the strategies below change what they must.

    Attributes:
        name: its name in the configuration.
        copy_noise: standard deviation of noise on copies that does not cancel (not exact), or ``None``.
        moments, rate: what ``auto`` means with it.
    """

    name: ClassVar[str]
    copy_noise: ClassVar[float | None] = None
    moments: ClassVar[str] = "scaled"
    rate: ClassVar[str] = "keep"

    def reason(self, old: ModelSpec, new: ModelSpec) -> str | None:
        """Why the function changes; ``None`` when it does not.

        Raises:
            UserError: the strategy cannot grow this model so; says what would do.
        """
        raise NotImplementedError

    def weighted(self, old: ModelSpec, new: ModelSpec) -> bool:
        """Whether norms weigh their statistics afterwards."""
        return old.weighted_norms

    def embed(self, old: int, new: int) -> AxisMap:
        """The map of the residual stream."""
        return floor_map(old, new)

    def units(self, old: int, new: int) -> AxisMap:
        """The map of groups, queries of a group, and MLP units."""
        return floor_map(old, new)

    def maps(self, old: ModelSpec, new: ModelSpec, seed: int) -> WidthMaps:
        """All maps of the growth from ``old`` to ``new``."""
        queries = self.units(old.queries, new.queries)
        shared = {
            Axis.EMBED: self.embed(old.embed, new.embed),
            Axis.KV_GROUPS: self.units(old.kv_groups, new.kv_groups),
            Axis.MLP: self.units(old.mlp, new.mlp),
            Axis.QUERIES: queries,
            Axis.SLOT: slot_map(queries),
        }
        return WidthMaps(shared, ({},) * new.layers)

    def refuse(self, why: str, instead: str) -> UserError:
        """The error of a growth that this strategy cannot do."""
        return UserError(f"growth.width={self.name}: {why}; {instead}")


def grows(old: ModelSpec, new: ModelSpec) -> bool:
    """Whether any width changes."""
    return any(getattr(old, key) != getattr(new, key) for key in ("kv_groups", "queries", "embed", "mlp"))


def _exact_instead(spec: ModelSpec) -> str:
    return "iso" if spec.rms_norm else "weighted"


class Replicate(WidthStrategy):
    """Copies of every unit, readers share (Net2Net, arXiv 1511.05641; HyperCloning, arXiv 2409.12903).

    Exact for heads and MLP units by any number, and for the residual stream by whole multiples.
    """

    name = "replicate"

    def reason(self, old: ModelSpec, new: ModelSpec) -> str | None:
        if new.embed % old.embed:
            sizes = f"width {old.embed} -> {new.embed} is no whole multiple"
            raise self.refuse(sizes, f"{_exact_instead(old)} is exact there")
        return None


class Weighted(WidthStrategy):
    """Norm statistics weighted by one over the number of copies (Masked Structural Growth, arXiv 2305.02869).

    Exact under LayerNorm for any width, before or behind the sub-layers; ``growth.anneal`` leads the weights back.
    """

    name = "weighted"

    def reason(self, old: ModelSpec, new: ModelSpec) -> str | None:
        if old.rms_norm:
            raise self.refuse(f"it is for LayerNorm, and {old.family} has RMSNorm", "iso would do")
        return None

    def weighted(self, old: ModelSpec, new: ModelSpec) -> bool:
        return old.weighted_norms or bool(new.embed % old.embed)


class Iso(WidthStrategy):
    """Copies carry ``1 / sqrt(count)`` of the unit, so that RMSNorm sees the same mean square (growth.md, 1.1)."""

    name = "iso"

    def reason(self, old: ModelSpec, new: ModelSpec) -> str | None:
        if not old.rms_norm:
            raise self.refuse(f"it is exact for RMSNorm only, and {old.family} has LayerNorm", "weighted would do")
        return None

    def embed(self, old: int, new: int) -> AxisMap:
        item = floor_map(old, new)
        return replace(item, write=item.counts.rsqrt(), eta=float(np.sqrt(old / new)))


class Lemon(WidthStrategy):
    """As many whole copies as fit, and channels that hold the mean, which LayerNorm makes zero (arXiv 2310.07999).

    Exact under pre-norm LayerNorm for any width. The pads' readers are free, and random.
    """

    name = "lemon"

    def reason(self, old: ModelSpec, new: ModelSpec) -> str | None:
        if not old.pre_norm or old.rms_norm:
            kind = "post-LN" if not old.pre_norm else "RMSNorm"
            raise self.refuse(
                f"it is exact for pre-norm LayerNorm, and {old.family} is {kind}", f"{_exact_instead(old)} would do"
            )
        if old.weighted_norms:
            raise self.refuse("the model's norms weigh their statistics", "weighted would do, or growth.anneal before")
        return None

    def embed(self, old: int, new: int) -> AxisMap:
        whole = new // old
        item = floor_map(old, new)
        item = item.fill(item.number >= whole, Fill.MEAN, Fill.RANDOM)
        return replace(item, eta=float(np.sqrt(whole * old / new)))


class ZeroPad(WidthStrategy):
    """New units that nobody writes (residual stream) or nobody reads (heads, MLP) at first (arXiv 2308.06103).

    Exact; the residual stream needs RMSNorm. The other side of each new unit is random.
    """

    name = "zero_pad"

    def reason(self, old: ModelSpec, new: ModelSpec) -> str | None:
        if new.embed != old.embed and not old.rms_norm:
            raise self.refuse(
                f"the residual stream needs RMSNorm, and {old.family} has LayerNorm",
                f"{_exact_instead(old)} would do, or a fixed model.width",
            )
        return None

    def embed(self, old: int, new: int) -> AxisMap:
        item = floor_map(old, new)
        item = item.fill(~item.original, Fill.ZERO, Fill.RANDOM)
        return replace(item, eta=float(np.sqrt(old / new)))

    def units(self, old: int, new: int) -> AxisMap:
        item = floor_map(old, new)
        return item.fill(~item.original, Fill.RANDOM, Fill.ZERO)


class BlockDiagonal(WidthStrategy):
    """Several copies of the network side by side: ``diag(W, W)`` (Staged Training, arXiv 2203.06211).

    Where only what is read grows, readers share as in ``replicate``.
    """

    name = "blockdiag"

    def reason(self, old: ModelSpec, new: ModelSpec) -> str | None:
        if new.embed % old.embed:
            sizes = f"width {old.embed} -> {new.embed} is no whole multiple"
            raise self.refuse(sizes, f"{_exact_instead(old)} is exact there")
        return None

    def embed(self, old: int, new: int) -> AxisMap:
        return replace(floor_map(old, new), pick=True)

    def units(self, old: int, new: int) -> AxisMap:
        return replace(floor_map(old, new), pick=True)


class Sparkling(WidthStrategy):
    """Copies read with one factor that keeps the size of what is read (SPARKLING, arXiv 2602.02472).

    ``sqrt(d / (3 d' - 2 d))`` up to a doubling, ``d / d'`` beyond. Exact for whole multiples only. The copies' moments
    start anew and their rate re-warms.
    """

    name = "sparkling"
    moments = "asym_reset"
    rate = "asym_rewarm"

    def reason(self, old: ModelSpec, new: ModelSpec) -> str | None:
        axes = ("embed", "kv_groups", "queries", "mlp")
        uneven = [key for key in axes if getattr(new, key) % getattr(old, key)]
        if not uneven:
            return None
        return f"growth.width sparkling: {uneven[0]} is no whole multiple, so copies' shares do not add up to one"

    def embed(self, old: int, new: int) -> AxisMap:
        return self.units(old, new)

    def units(self, old: int, new: int) -> AxisMap:
        item = floor_map(old, new)
        factor = (old / (3 * new - 2 * old)) ** 0.5 if new <= 2 * old else old / new
        return item if new == old else replace(item, read=torch.full_like(item.read, factor))


class Aki(WidthStrategy):
    """Added units are those of the layer above (bert2BERT's advanced knowledge initialisation, arXiv 2110.07143)."""

    name = "aki"
    moments = "reset"

    def reason(self, old: ModelSpec, new: ModelSpec) -> str | None:
        return "growth.width aki: added units come from the layer above" if grows(old, new) else None

    def embed(self, old: int, new: int) -> AxisMap:
        return self.units(old, new)

    def units(self, old: int, new: int) -> AxisMap:
        item = floor_map(old, new)
        return replace(item, written=torch.where(item.original, 0, int(Fill.NEXT)).to(torch.int8))


class Elle(WidthStrategy):
    """The paper's recipe: random maps, plain norm statistics, noise on copies (arXiv 2203.06311; elle.md, 1)."""

    name = "elle"
    copy_noise = 0.01
    moments = "reset"

    def reason(self, old: ModelSpec, new: ModelSpec) -> str | None:
        return "growth.width elle: random maps under plain norm statistics, and copy noise" if grows(old, new) else None

    def maps(self, old: ModelSpec, new: ModelSpec, seed: int) -> WidthMaps:
        drawn = np.random.RandomState(seed)
        queries = floor_map(old.queries, new.queries)
        embed = random_map(old.embed, new.embed, drawn)
        layers = []
        for _ in range(new.layers):
            heads = random_map(old.kv_groups, new.kv_groups, drawn)
            layers.append({Axis.KV_GROUPS: heads, Axis.MLP: random_map(old.mlp, new.mlp, drawn)})
        return WidthMaps({Axis.EMBED: embed, Axis.QUERIES: queries, Axis.SLOT: slot_map(queries)}, tuple(layers))


def automatic(old: ModelSpec, new: ModelSpec) -> str:
    """The strategy that ``growth.width: auto`` takes: exact for the family and the sizes.

    Where several are exact it is the one that learns fastest afterwards
    (benchmarks/results/growth-study-2026-11-25.md): ``zero_pad`` under RMSNorm, ``lemon`` before ``weighted``.
    """
    if old.rms_norm:
        return "zero_pad"
    if new.embed % old.embed == 0:
        return "replicate"
    if old.pre_norm and not old.weighted_norms:
        return "lemon"
    return _exact_instead(old)
