"""Growing twice is growing once by the composed plan, or the plans say that they do not compose."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from elle_mp.errors import UserError
from elle_mp.growth.depth import DepthStrategy
from elle_mp.growth.maps import floor_map
from elle_mp.growth.plan import SIZES, GrowthPlan
from elle_mp.growth.rates import factors_of
from elle_mp.growth.registry import names
from elle_mp.growth.width import WidthStrategy
from elle_mp.models.declarations import declarations
from elle_mp.models.transformer import Transformer
from elle_mp.train.optimizer import ShardedAdamW
from tests.tiny import (
    FAMILIES,
    MODELS,
    PLAIN,
    apply,
    config_of,
    copying_plan_of,
    grid,
    model_of,
    moments,
    optimizer_of,
    plan_of,
    plans_of,
    scatter_moments,
    spec_of,
    weights,
)

CHAINED = ("bert", "gpt", "gpt untied", "llama", "llama GQA tied")
TWO = {"heads": 8, "mlp": 80, "layers": 4}
FOUR = {"heads": 16, "mlp": 160, "layers": 8}
FIVE = {"heads": 5, "mlp": 57, "layers": 3}
SEVEN = {"heads": 7, "mlp": 131, "layers": 5}


def stateful(name: str, **changes: Any) -> tuple[Transformer, ShardedAdamW]:
    """A model whose weights and moments are all different from one another."""
    old = model_of(spec_of(**MODELS[name] | changes), grid())
    optimizer = optimizer_of(old)
    scatter_moments(old, optimizer, seed=5, step=9)
    return old, optimizer


def everything(model: Transformer, optimizer: ShardedAdamW) -> dict[str, Tensor]:
    """Weights, moments, step counts and the norms' weights."""
    out = weights(model) | moments(optimizer)
    return out if model.norm_stats is None else out | {"norm_stats": model.norm_stats}


def grow_by(plans: list[GrowthPlan], name: str) -> tuple[Transformer, ShardedAdamW]:
    model, optimizer = stateful(name)
    for plan in plans:
        model, optimizer, _ = apply(plan, model, optimizer.moments)
    return model, optimizer


def check_composed(name: str, chain: list[GrowthPlan], tolerance: float) -> GrowthPlan:
    """Growing by all plans in turn is growing by the one composed of them, which goes to JSON and back."""
    made = chain[0]
    for later in chain[1:]:
        made = made.then(later)
    whole = GrowthPlan.from_json(json.loads(json.dumps(made.to_json())))
    assert whole.to_json() == made.to_json()
    assert (whole.old, whole.new) == (chain[0].old, chain[-1].new)
    stepwise, stepwise_optimizer = grow_by(chain, name)
    once, once_optimizer = grow_by([whole], name)
    assert once.spec == stepwise.spec
    got, wanted = everything(once, once_optimizer), everything(stepwise, stepwise_optimizer)
    assert list(got) == list(wanted)
    for key, value in wanted.items():
        torch.testing.assert_close(got[key], value, rtol=tolerance, atol=0, msg=key)
    return whole


@pytest.mark.parametrize("name", CHAINED)
def test_doubling_twice_is_the_plan_for_four_times_bit_for_bit(name: str) -> None:
    """Powers of two divide without rounding; layers, gates, weights and moments included."""
    groups = {"kv_groups": 4} if "GQA" in name else {}
    two, four = plans_of(name, TWO | groups, FOUR | groups)
    whole = check_composed(name, [two, four], 0)
    (direct,) = plans_of(name, FOUR | groups)
    assert whole.to_json() == direct.to_json()
    assert whole.exact and whole.width == "replicate"


@pytest.mark.parametrize("name", CHAINED)
def test_uneven_growths_compose_to_a_map_that_no_single_plan_has(name: str) -> None:
    """4 to 5 to 7: the floor of a floor is not the floor map, and some norms weigh their statistics twice."""
    groups = {"llama": (5, 7), "llama GQA tied": (3, 4)}.get(name)
    first, last = FIVE, SEVEN
    if groups is not None:
        first, last = ({**grow, "kv_groups": count} for grow, count in zip((FIVE, SEVEN), groups, strict=True))
    if "GQA" in name:
        first, last = first | {"heads": 6}, last | {"heads": 8}
    whole = check_composed(name, plans_of(name, first, last), 1e-14)
    assert whole.exact and whole.width == ("iso" if "llama" in name else "weighted")
    twice, once = floor_map(4, 5).then(floor_map(5, 7)), floor_map(4, 7)
    assert twice.index.tolist() == [0, 0, 0, 1, 1, 2, 3] and once.index.tolist() == [0, 0, 1, 1, 2, 2, 3]
    (direct,) = plans_of(name, last)
    assert whole.to_json()["maps"] != direct.to_json()["maps"]
    assert whole.layer_source == (0, 0, 0, 0, 1) and direct.layer_source == (0, 0, 0, 1, 1)
    assert all(getattr(whole.new, size) == getattr(direct.new, size) for size in SIZES)


def test_three_growths_with_a_strategy_each() -> None:
    chain = plans_of("gpt", {"heads": 5}, {"heads": 6, "layers": 3}, width="weighted")
    last, _ = plan_of(chain[-1].new, config_of("gpt", heads=6, layers=3).model, {"mlp": 57}, **PLAIN, width="replicate")
    whole = check_composed("gpt", [*chain, last], 1e-14)
    assert whole.width == "weighted+replicate" and whole.summary()["exact"]


@pytest.mark.parametrize("moments_name", ["scaled", "asym_reset", "reset"])
@pytest.mark.parametrize("name", ["bert", "gpt", "llama"])
def test_every_way_to_treat_moments_composes(name: str, moments_name: str) -> None:
    groups = {"kv_groups": 8} if name == "llama" else {}
    chain = plans_of(name, TWO | groups, {"layers": 5, "mlp": 93}, moments=moments_name)
    check_composed(name, chain, 1e-14)


@pytest.mark.parametrize(
    ("name", "growth", "chain"),
    [
        ("gpt", {"width": "lemon"}, [{"heads": 8}, {"heads": 16}]),  # whole copies: no pads
        ("gpt", {"width": "sparkling"}, [FIVE, SEVEN]),
        ("gpt", {"depth": "stack"}, [{"layers": 4}, {"layers": 6}]),
        ("bert", {"depth": "interleave"}, [{"layers": 3}, {"layers": 6}]),
        ("llama", {"depth": "solar"}, [{"layers": 3}, {"layers": 5}]),
        ("gpt", {"depth": "elle"}, [{"layers": 3}, {"layers": 4}]),
        ("bert", {"depth": "affine_migrate"}, [{"layers": 3}, {"heads": 8}]),
        ("gpt", {}, [{"seq_len": 20}, {"heads": 6}]),
    ],
)
def test_other_strategies_that_compose(name: str, growth: dict[str, str], chain: list[dict[str, int]]) -> None:
    whole = check_composed(name, plans_of(name, *chain, **growth), 1e-14)
    inexact = {*growth.values()} & {"sparkling", "stack", "interleave", "solar", "elle", "affine_migrate"}
    assert whole.exact is not bool(inexact)


def test_rates_of_two_growths_are_those_of_the_composed_one() -> None:
    for name in ("bert", "gpt", "llama"):
        chain = plans_of(name, {"heads": 5, "mlp": 57}, {"heads": 7, "mlp": 131, "layers": 3})
        twice, once = factors_of(chain, declarations), factors_of([chain[0].then(chain[1])], declarations)
        assert list(twice) == list(once)
        for key, found in once.items():
            for which in ("rate", "eps"):
                for ours, theirs in zip(getattr(found, which), getattr(twice[key], which), strict=True):
                    ones = torch.ones(()).double()
                    torch.testing.assert_close(
                        ones if ours is None else ours, ones if theirs is None else theirs, rtol=1e-14, atol=0
                    )
            assert found.new == twice[key].new


REFUSED: dict[str, tuple[str, list[dict[str, int]], list[dict[str, Any]], str]] = {
    "another model": ("gpt", [{"heads": 6}, {"heads": 5}], [{}, {}], "another model"),
    "noise": ("gpt", [{"heads": 6}, {"heads": 7}], [{"noise_db": 20.0}, {"noise_db": 20.0}], "noise"),
    "noise in one": ("gpt", [{"heads": 6}, {"heads": 7}], [{}, {"noise_db": 20.0}], "noise"),
    "other moments": ("gpt", [{"heads": 6}, {"heads": 7}], [{}, {"moments": "reset"}], "moments"),
    "other rates": ("gpt", [{"heads": 6}, {"heads": 7}], [{}, {"rate": "keep"}], "rate"),
    "other depth": ("gpt", [{"layers": 3}, {"layers": 4}], [{}, {"depth": "stack", "moments": "scaled"}], "depth"),
    "random maps": ("gpt", [{"heads": 6}, {"heads": 7}], [{"width": "elle"}] * 2, "elle"),
    "copy noise of the second": ("gpt", [{"heads": 8}, {"mlp": 57}], [{"moments": "reset"}, {"width": "elle"}], "elle"),
    "the layer above": ("bert", [{"mlp": 57}, {"width": 48}], [{"width": "aki"}] * 2, "aki"),
    "means": ("gpt", [{"heads": 6}, {"mlp": 57}], [{"width": "lemon"}] * 2, "lemon"),
    "random new units": ("llama", [{"mlp": 57}, {"heads": 6}], [{"width": "zero_pad"}] * 2, "zero_pad"),
    "random longer heads": ("gpt", [{"head_dim": 12}, {"mlp": 57}], [{}, {}], "does not compose"),
    "random ids": ("llama", [{"vocab": 400}, {"heads": 8}], [{}, {}], "does not compose"),
    "block-diagonal": ("gpt", [{"mlp": 80}, {"width": 64}], [{"width": "blockdiag"}] * 2, "blockdiag"),
    "norms moved twice": ("bert", [{"layers": 3}, {"layers": 4}], [{"depth": "affine_migrate"}] * 2, "affine_migrate"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_compose_says_so(case: str) -> None:
    """The random part would be drawn at another place, or the second growth would see what the first one made."""
    name, (one, two), (first_growth, second_growth), word = REFUSED[case]
    changes = {"width": 32} if "width" in two else {}
    spec, sizes = spec_of(**MODELS[name] | changes), config_of(**MODELS[name] | changes).model
    first, middle = copying_plan_of(spec, sizes, one, **PLAIN | first_growth)
    start = spec if case == "another model" else first.new
    second, _ = copying_plan_of(start, sizes if case == "another model" else middle, two, **PLAIN | second_growth)
    with pytest.raises(ValueError, match=word):
        first.then(second)


@pytest.mark.parametrize("family", FAMILIES)
def test_growing_by_nothing_is_bitwise_nothing_with_every_strategy(family: str) -> None:
    """Noise on, moments to be dropped: with nothing to grow there is nothing to draw and nothing to drop."""
    name = {"bert": "bert", "gpt": "gpt untied", "llama": "llama GQA tied"}[family]
    old, optimizer = stateful(name)
    sizes = config_of(**MODELS[name]).model
    before = everything(old, optimizer)
    taken = set()
    for kind, key in ((WidthStrategy, "width"), (DepthStrategy, "depth")):
        for strategy in names(kind):
            try:
                plan, _ = plan_of(old.spec, sizes, {}, **{key: strategy})
            except UserError:
                continue
            taken.add((key, strategy))
            assert plan.exact and plan.unchanged and plan.new == plan.old and plan.moments == "scaled"
            after = everything(*apply(plan, old, optimizer.moments)[:2])
            assert list(after) == list(before)
            assert all(torch.equal(before[item], after[item]) for item in before), strategy
    refused = {
        "bert": {("width", "iso"), ("width", "lemon"), ("depth", "zero_out")},
        "gpt": {("width", "iso"), ("depth", "gate"), ("depth", "affine_migrate")},
        "llama": {("width", "weighted"), ("width", "lemon"), ("depth", "gate"), ("depth", "affine_migrate")},
    }[family]
    everyone = {("width", item) for item in names(WidthStrategy)} | {("depth", item) for item in names(DepthStrategy)}
    assert taken == everyone - refused
