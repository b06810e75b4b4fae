"""Learning-rate and epsilon multipliers that the growths of a model leave (growth.md, 1.3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from elle_mp.axes import ParamSpec
from elle_mp.growth.factors import Factors
from elle_mp.growth.maps import Fill
from elle_mp.growth.plan import GrowthPlan
from elle_mp.growth.tensors import DimGrowth, TensorGrowth, TensorPlanner
from elle_mp.models.spec import ModelSpec

Declarations = Callable[[ModelSpec], Mapping[str, ParamSpec]]


def factors_of(lineage: Sequence[GrowthPlan], declarations: Declarations) -> dict[str, Factors]:
    """The factors of every parameter of the model that ``lineage`` ends in; empty without a growth.

    Under ``mup`` an entry scaled by ``s`` gets ``s`` times the rate, and one whose gradient was scaled by ``r``
    gets ``r`` times Adam's epsilon: then AdamW's steps commute with growth (mu-P's rule ``1 / fan_in`` for matrices).
    Factors of successive growths multiply. What is old and what is new is said by the last growth.

    Args:
        declarations: the parameters of a model, by name.
    """
    known: dict[str, Factors] = {}
    for plan in lineage:
        planner = TensorPlanner(plan)
        known = {
            name: _after(plan, planner(name, spec), known, _inserted(plan, name), len(spec.dims))
            for name, spec in declarations(plan.new).items()
        }
    return known


def _inserted(plan: GrowthPlan, name: str) -> bool:
    layer, _ = plan.locate(name)
    return layer is not None and plan.inserted[layer]


def _after(plan: GrowthPlan, growth: TensorGrowth, known: Mapping[str, Factors], inserted: bool, dims: int) -> Factors:
    none: tuple[Tensor | None, ...] = (None,) * dims
    before = known.get(growth.source or "", Factors(none, none, none))
    mup = plan.rate == "mup"
    return Factors(
        rate=tuple(
            _mapped(values, item, item.scale if item is not None and mup else None)
            for values, item in zip(before.rate, growth.dims, strict=True)
        ),
        eps=tuple(
            _mapped(values, item, item.ratio if item is not None and mup else None)
            for values, item in zip(before.eps, growth.dims, strict=True)
        ),
        old=tuple(None if item is None else item.item.original for item in growth.dims),
        new=inserted or growth.source is None,
    )


def _mapped(values: Tensor | None, item: DimGrowth | None, factor: Tensor | None) -> Tensor | None:
    """The factors of a dimension after growth; what is no copy has none."""
    if item is None:
        return values
    out = torch.ones_like(item.scale) if values is None else values[item.item.index]
    if factor is not None:
        out = out * factor
    out = torch.where(item.fill == int(Fill.COPY), out, 1.0)
    return None if bool((out == 1).all()) else out
