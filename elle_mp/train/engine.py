"""A model and its optimizer under the engine of a layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from elle_mp.config import OptimConfig
from elle_mp.growth.apply import Traffic, grow_on_shards
from elle_mp.growth.factors import Factors
from elle_mp.growth.plan import GrowthPlan
from elle_mp.models.build import Precision, empty_model
from elle_mp.models.spec import ModelSpec
from elle_mp.parallel.mesh import Grid
from elle_mp.parallel.pipeline import Costs
from elle_mp.train.deepspeed import ZeroAdamW, grow_zero, hollow_model
from elle_mp.train.optimizer import ShardedAdamW


def make_optimizer(
    spec: ModelSpec, grid: Grid, precision: Precision, optim: OptimConfig, factors: Mapping[str, Factors] | None = None
) -> ShardedAdamW:
    """A model that has memory but no values yet (``.model``), and its optimizer, as ``parallel.engine`` says."""
    if grid.parallel.engine == "deepspeed":
        return ZeroAdamW(hollow_model(spec, grid, precision), optim, factors)
    return ShardedAdamW(empty_model(spec, grid, precision, grid.parallel.reshard_after_forward), optim, factors)


def grow_optimizer(
    plan: GrowthPlan,
    optimizer: ShardedAdamW,
    precision: Precision,
    optim: OptimConfig,
    factors: Mapping[str, Factors] | None = None,
    costs: Costs | None = None,
) -> tuple[ShardedAdamW, Traffic]:
    """The larger model and its optimizer, both filled from the smaller ones; what was sent. Collective.

    Args:
        costs: by which the larger model's layers are shared out over a pipeline; ``None`` for estimated ones.
    """
    if isinstance(optimizer, ZeroAdamW):
        return grow_zero(plan, optimizer, optim, factors, precision)
    larger = make_optimizer(plan.new, replace(optimizer.grid, costs=costs), precision, optim, factors)
    traffic = grow_on_shards(plan, optimizer.model, larger.model, optimizer.moments, larger.moments)
    larger.loaded()
    return larger, traffic
