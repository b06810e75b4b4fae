"""Rates, epsilons and ages that growths leave: the tables' numbers, through any lineage, and what they do to a step."""

from __future__ import annotations

import json
from functools import reduce
from math import prod

import pytest
import torch
from torch import Tensor

from elle_mp.config import OptimConfig
from elle_mp.errors import UserError
from elle_mp.growth.factors import After, Factors
from elle_mp.growth.plan import GrowthPlan
from elle_mp.growth.rates import factors_of
from elle_mp.growth.registry import names
from elle_mp.growth.width import WidthStrategy
from elle_mp.models.declarations import declarations
from elle_mp.train.optimizer import ShardedAdamW
from tests.growth.oracle import Growth
from tests.tiny import (
    MODELS,
    apply,
    config_of,
    copying_plan_of,
    grid,
    model_of,
    optimizer_of,
    plans_of,
    spec_of,
    text,
    weights,
)

RATED = ("bert", "gpt", "gpt untied", "llama GQA", "llama tied")


@pytest.fixture(autouse=True)
def one_rank() -> None:
    """Declarations are those of a model, and a model lies on a grid."""
    grid()


def entries(values: tuple[Tensor | None, ...], shape: tuple[int, ...]) -> Tensor:
    """The product over dimensions, an entry each."""
    parts = [torch.ones(size) if item is None else item for item, size in zip(values, shape, strict=True)]
    return reduce(lambda left, right: left[..., None] * right, parts, torch.ones((), dtype=torch.float64))


def shapes(plan: GrowthPlan) -> dict[str, tuple[int, ...]]:
    return {name: spec.shape(plan.new.axes) for name, spec in declarations(plan.new).items()}


@pytest.mark.parametrize("grow", [{"heads": 6, "mlp": 57}, {"heads": 12, "mlp": 80}], ids=["uneven", "whole"])
@pytest.mark.parametrize("name", RATED)
def test_mup_is_the_scale_for_the_rate_and_its_share_for_epsilon(name: str, grow: dict[str, int]) -> None:
    (plan,) = plans_of(name, grow)
    tables = Growth(plan.old, plan.new, plan.width == "iso")
    found = factors_of([plan], declarations)
    assert set(found) == set(shapes(plan))
    for parameter, shape in shapes(plan).items():
        scale, ratio = tables.factors(parameter)
        for got, wanted in ((found[parameter].rate, scale), (found[parameter].eps, ratio)):
            torch.testing.assert_close(entries(got, shape), wanted.expand(shape), rtol=1e-14, atol=0, msg=parameter)


@pytest.mark.parametrize("rate", ["keep", "rewarm", "asym_rewarm"])
def test_only_mup_changes_rates_for_good(rate: str) -> None:
    (plan,) = plans_of("gpt", {"heads": 6, "layers": 3}, rate=rate)
    found = factors_of([plan], declarations)
    assert all(item is None for factors in found.values() for item in (*factors.rate, *factors.eps))
    assert any(item is not None for factors in found.values() for item in factors.old)


def test_rates_outlast_a_growth_that_keeps_them() -> None:
    """The second growth has another rate strategy: the first one's factors follow the copies and stay."""
    (first,) = plans_of("gpt", {"heads": 8, "mlp": 80})
    second, _ = copying_plan_of(
        first.new, config_of("gpt", heads=8, mlp=80).model, {"heads": 12}, noise_db=None, rate="keep"
    )
    before, after = factors_of([first], declarations), factors_of([first, second], declarations)
    name = "layers.0.mlp.in_weight"
    assert entries(before[name].rate, shapes(first)[name]).unique().tolist() == [0.5]
    assert entries(after[name].rate, shapes(second)[name]).unique().tolist() == [0.5]
    assert entries(after[name].eps, shapes(second)[name]).unique().tolist() == [0.5]


def test_factors_of_successive_growths_multiply() -> None:
    lineage = plans_of("gpt", {"heads": 8}, {"heads": 16, "mlp": 320})
    found = factors_of([GrowthPlan.from_json(json.loads(json.dumps(plan.to_json()))) for plan in lineage], declarations)
    name = "layers.1.mlp.out_weight"  # read from 40, then 320 units; written to 32, 64, 128 channels
    assert entries(found[name].rate, shapes(lineage[1])[name]).unique().tolist() == [1 / 8]
    assert entries(found[name].eps, shapes(lineage[1])[name]).unique().tolist() == [1 / 4]
    assert factors_of([], declarations) == {}


@pytest.mark.parametrize("width", names(WidthStrategy))
@pytest.mark.parametrize("name", ["bert", "gpt", "llama GQA"])
def test_the_old_entries_are_as_many_as_the_old_model_has(name: str, width: str) -> None:
    """Each old entry stands at one place of the new parameter; all else is new, and what is no copy has rates of 1."""
    heads = 8 if width in ("replicate", "blockdiag") else 6
    try:
        (plan,) = plans_of(name, {"heads": heads, "mlp": 57, "layers": 3}, width=width)
    except UserError:
        assert (name, width) in {
            ("bert", "iso"), ("bert", "lemon"), ("bert", "zero_pad"), ("gpt", "iso"), ("gpt", "zero_pad"),
            ("llama GQA", "weighted"), ("llama GQA", "lemon"),
        }  # fmt: skip
        return
    found = factors_of([plan], declarations)
    old_shapes = {key: spec.shape(plan.old.axes) for key, spec in declarations(plan.old).items()}
    seen = set()
    for parameter, shape in shapes(plan).items():
        layer, suffix = plan.locate(parameter)
        assert found[parameter].new is (layer is not None and plan.inserted[layer]), parameter
        if found[parameter].new:
            continue
        source = parameter if layer is None else f"layers.{plan.layer_source[layer]}.{suffix}"
        seen.add(source)
        assert int(entries(found[parameter].old, shape).sum()) == prod(old_shapes[source]), parameter
    assert seen == set(old_shapes)


def test_what_is_no_copy_trains_at_the_plain_rate() -> None:
    (plan,) = plans_of("llama tied", {"heads": 6}, width="zero_pad")
    rates = factors_of([plan], declarations)["layers.0.attention.qkv_weight"].rate[1]
    assert rates is None  # old channels are read as before, new ones are free


@pytest.mark.parametrize(("name", "grow"), [("gpt", {"layers": 3}), ("bert", {"layers": 3}), ("gpt", {"heads": 6})])
def test_frozen_old_entries_rest_and_everything_else_learns(name: str, grow: dict[str, int]) -> None:
    """The knowledge of the old model lies in entries that no step touches; then they learn too."""
    old = model_of(spec_of(**MODELS[name]), grid())
    (plan,) = plans_of(name, grow, rate="keep")
    new, _, _ = apply(plan, old, optimizer_of(old).moments)
    factors = factors_of([plan], declarations)
    optimizer = ShardedAdamW(new, OptimConfig(lr=1e-2), factors)
    start = weights(new)

    def step(after: After) -> dict[str, Tensor]:
        tokens, domain, targets = text(4, seed=7)
        (new(tokens, domain, targets) / targets.numel()).backward()
        optimizer.step(1.0, after)
        return weights(new)

    for _ in range(3):
        frozen = step(After(freeze_old=True))
    for parameter, value in frozen.items():
        same, kept = value == start[parameter], old_entries(factors[parameter], value)
        assert bool(same[kept].all()), parameter
        # Behind a gate that is zero in the first step all gradients of its layer are zero in that step alone.
        if not parameter.endswith("_table") and not bool(kept.all()):
            assert not bool(same[~kept].all()), parameter
    free = step(After())
    assert all(not torch.equal(value, frozen[parameter]) for parameter, value in free.items())


def old_entries(factors: Factors, value: Tensor) -> Tensor:
    if factors.new:
        return torch.zeros_like(value, dtype=torch.bool)
    return entries(factors.old, tuple(value.shape)).bool()
