"""The catalogue of depth strategies: which layer each new one copies, and how it starts (growth.md, 1.5 and 4).

A strategy is a class; adding one is writing it here. ``growth.depth`` names it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from elle_mp.errors import UserError
from elle_mp.models.spec import ModelSpec

BRANCH_OUTPUTS = ("attention.out_weight", "attention.out_bias", "mlp.out_weight", "mlp.out_bias")
"""What a layer's sub-layers write into the residual stream."""

LARGEST_EXACT_EPS = 1e-12
"""BERT's own epsilon, up to which ``affine_migrate`` stays within 1e-10 of the function."""


@dataclass(frozen=True)
class Placement:
    """Where the layers of the larger model come from.

    Attributes:
        source: for each new layer, the old layer that it copies.
        inserted: for each new layer, whether it is an added copy.
        lineage, duplicated: the bookkeeping of :class:`ModelSpec`, for ``elle``.
    """

    source: tuple[int, ...]
    inserted: tuple[bool, ...]
    lineage: tuple[int, ...]
    duplicated: tuple[int, ...] = ()


@dataclass(frozen=True)
class Treatment:
    """What becomes of one parameter besides its map.

    Attributes:
        zero: its values become zero; the noise stays, since it cancels.
        constant: all its values are this one.
        fold: names of the old norm weight and bias that the matrix (or its bias) takes over.
        fresh: Adam starts anew.
    """

    zero: bool = False
    constant: float | None = None
    fold: tuple[str, str] | None = None
    fresh: bool = False


class DepthStrategy:
    """Spreads copies evenly over the depth; each stands behind its original.

    Attributes:
        name: its name in the configuration.
        gated: added layers get a gate that starts at zero.
        duplicates: added layers compute what their source computes, from the first step on.
        composes: adding layers twice is adding them once.
        moments: what ``auto`` means with it.
    """

    name: ClassVar[str]
    gated: ClassVar[bool] = False
    duplicates: ClassVar[bool] = False
    composes: ClassVar[bool] = True
    moments: ClassVar[str] = "scaled"

    def reason(self, old: ModelSpec, new: ModelSpec) -> str | None:
        """Why the function changes; ``None`` when it does not.

        Raises:
            UserError: the strategy cannot grow this model so; says what would do.
        """
        if new.layers == old.layers:
            return None
        return f"growth.depth {self.name}: added layers are not the identity"

    def source(self, old: ModelSpec, new: ModelSpec, seed: int) -> list[int]:
        """For each new layer, the old layer it copies."""
        return [layer * old.layers // new.layers for layer in range(new.layers)]

    def place(self, old: ModelSpec, new: ModelSpec, seed: int) -> Placement:
        """Where the new layers come from; the first copy of a layer is the layer itself."""
        source = self.source(old, new, seed)
        inserted = tuple(layer in source[:index] for index, layer in enumerate(source))
        unchanged = old.layers == new.layers
        return Placement(
            tuple(source),
            inserted,
            old.lineage if unchanged else tuple(range(new.layers)),
            old.duplicated if unchanged else (),
        )

    def treat(self, placement: Placement, layer: int, suffix: str) -> Treatment:
        """What becomes of the parameter ``suffix`` of a new layer."""
        return Treatment()

    def refuse(self, why: str, instead: str) -> UserError:
        """The error of a growth that this strategy cannot do."""
        return UserError(f"growth.depth={self.name}: {why}; {instead}")


class ZeroOut(DepthStrategy):
    """Added layers write nothing at first (arXiv 2308.06103, 3.6; LLaMA-Pro, arXiv 2401.02415). Exact, pre-norm."""

    name = "zero_out"

    def reason(self, old: ModelSpec, new: ModelSpec) -> str | None:
        if not old.pre_norm:
            raise self.refuse(f"it is not the identity for {old.family} (post-LN)", "gate is")
        return None

    def treat(self, placement: Placement, layer: int, suffix: str) -> Treatment:
        added = placement.inserted[layer]
        return Treatment(zero=added and suffix.endswith(BRANCH_OUTPUTS), fresh=added)


class Gate(DepthStrategy):
    """Added layers stand behind ``x + g (layer(x) - x)`` with a trained ``g`` that starts at zero. Exact, post-LN.

    After LOIRE (ICLR 2025) and Masked Structural Growth (arXiv 2305.02869).
    """

    name = "gate"
    gated = True

    def reason(self, old: ModelSpec, new: ModelSpec) -> str | None:
        if old.pre_norm:
            raise self.refuse(f"{old.family} is pre-norm and needs no gate", "zero_out is exact there")
        return None

    def treat(self, placement: Placement, layer: int, suffix: str) -> Treatment:
        added = placement.inserted[layer]
        return Treatment(constant=0.0 if added and suffix == "gate" else None, fresh=added)


class AffineMigrate(DepthStrategy):
    """An added post-LN layer takes the affine map of the norm before it, and writes nothing at first (growth.md, 1.5).

    Norming twice is the identity up to ``eps / var``: exact for BERT's own 1e-12, and measured otherwise.
    """

    name = "affine_migrate"
    composes = False

    def reason(self, old: ModelSpec, new: ModelSpec) -> str | None:
        if old.pre_norm:
            raise self.refuse(f"{old.family} is pre-norm", "zero_out is exact there")
        if new.layers == old.layers:
            return None
        if old.gated:
            raise self.refuse("a layer behind a gate ends in no norm", "gate would do")
        if old.norm_eps > LARGEST_EXACT_EPS:
            return f"growth.depth affine_migrate: norms applied twice differ by eps / var, and eps is {old.norm_eps:g}"
        return None

    def treat(self, placement: Placement, layer: int, suffix: str) -> Treatment:
        added = placement.inserted[layer]
        followed = layer + 1 < len(placement.inserted) and placement.inserted[layer + 1]
        norm, _, part = suffix.rpartition(".")
        unit = 1.0 if part == "weight" else 0.0
        if norm == "mlp_norm":
            return Treatment(constant=unit, fresh=True) if followed else Treatment()
        if not added:
            return Treatment()
        if norm == "attention_norm":
            return Treatment(constant=unit, fresh=True)
        before = f"layers.{placement.source[layer]}.mlp_norm"
        reads = norm in ("attention", "mlp") and part in ("qkv_weight", "qkv_bias", "in_weight", "in_bias")
        fold = (f"{before}.weight", f"{before}.bias") if reads else None
        return Treatment(zero=suffix.endswith(BRANCH_OUTPUTS), fold=fold, fresh=True)


class Stack(DepthStrategy):
    """The whole stack again: ``l mod L`` (StackBERT; G_stack, arXiv 2405.15319). Not exact."""

    name = "stack"
    duplicates = True
    moments = "reset"

    def source(self, old: ModelSpec, new: ModelSpec, seed: int) -> list[int]:
        return [layer % old.layers for layer in range(new.layers)]


class Interleave(DepthStrategy):
    """Each layer twice in a row, spread evenly (Gong et al., 2019; MSLT, arXiv 2011.13635). Not exact."""

    name = "interleave"
    duplicates = True
    moments = "reset"


class Solar(DepthStrategy):
    """Two copies of the stack, without the first's last layers and the second's first ones (arXiv 2312.15166)."""

    name = "solar"
    duplicates = True
    moments = "reset"

    def reason(self, old: ModelSpec, new: ModelSpec) -> str | None:
        if new.layers > 2 * old.layers:
            raise self.refuse(
                f"two copies of {old.layers} layers make no {new.layers}", f"at most {2 * old.layers} layers would do"
            )
        return super().reason(old, new)

    def source(self, old: ModelSpec, new: ModelSpec, seed: int) -> list[int]:
        if new.layers == old.layers:
            return list(range(old.layers))
        head = -(-new.layers // 2)
        return [*range(head), *range(old.layers - (new.layers - head), old.layers)]


class ElleDepth(DepthStrategy):
    """Layers drawn at random, each once per doubling, are duplicated and both compute (elle.md, section 2)."""

    name = "elle"
    duplicates = True
    moments = "reset"

    def reason(self, old: ModelSpec, new: ModelSpec) -> str | None:
        added, left = new.layers - old.layers, old.layers - len(old.duplicated)
        if added > left:
            raise self.refuse(
                f"it duplicates each layer once per doubling: {left} are left, not {added}",
                f"at most {old.layers + left} layers would do",
            )
        return super().reason(old, new)

    def place(self, old: ModelSpec, new: ModelSpec, seed: int) -> Placement:
        chooser = random.Random(seed)
        candidates = [line for line in dict.fromkeys(old.lineage) if line not in old.duplicated]
        chosen = chooser.sample(candidates, new.layers - old.layers)
        source = [layer for layer in range(old.layers) for _ in range(1 + (old.lineage[layer] in chosen))]
        inserted = tuple(index > 0 and source[index] == source[index - 1] for index in range(new.layers))
        lineage, duplicated = tuple(old.lineage[layer] for layer in source), (*old.duplicated, *chosen)
        if new.layers != old.layers and new.layers % (max(lineage) + 1) == 0:
            lineage, duplicated = tuple(range(new.layers)), ()
        return Placement(tuple(source), inserted, lineage, duplicated)


def automatic(old: ModelSpec) -> str:
    """The strategy that ``growth.depth: auto`` takes: exact for the family."""
    return "zero_out" if old.pre_norm else "gate"
