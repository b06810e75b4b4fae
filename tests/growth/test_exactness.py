"""Growth keeps the function: every family, size, tying and precision, after real training, and again after growth."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from elle_mp.growth.plan import GrowthPlan
from elle_mp.models.transformer import Transformer
from elle_mp.train.optimizer import ShardedAdamW
from tests.growth.oracle import Growth
from tests.tiny import (
    MODELS,
    apply,
    config_of,
    copying_plan_of,
    grid,
    logits,
    model_of,
    moments,
    optimizer_of,
    plan_of,
    scatter_moments,
    spec_of,
    text,
    train,
    weights,
)

# heads: the width follows; (4, 2 groups) may also grow its groups.
GROWTHS: dict[str, dict[str, int]] = {
    "width x2": {"heads": 8},
    "width x1.5": {"heads": 6},
    "mlp x2": {"mlp": 80},
    "mlp, odd": {"mlp": 57},
    "layers x2": {"layers": 4},
    "layers, uneven": {"layers": 3},
    "all, x2": {"heads": 8, "mlp": 80, "layers": 4},
    "all, uneven": {"heads": 6, "mlp": 57, "layers": 5},
}
GROUPS: dict[str, dict[str, int]] = {
    "groups x2": {"heads": 8, "kv_groups": 4},
    "groups x1.5": {"heads": 6, "kv_groups": 3},
    "groups x1.5 and queries x2": {"heads": 12, "kv_groups": 3},
    "groups x2 and queries x1.5": {"heads": 12, "kv_groups": 4, "mlp": 57, "layers": 3},
    "queries x1.5": {"heads": 6, "kv_groups": 2},
}
PAIRS = [(model, growth) for model in MODELS for growth in GROWTHS] + [
    (model, growth) for model in ("llama GQA", "llama GQA tied") for growth in GROUPS
]
SOME = ("width x1.5", "all, uneven", "groups x2 and queries x1.5")
CASES = [
    (model, growth, dtype, noise)
    for model, growth in PAIRS
    for dtype, noise in (("float64", 20.0), ("float64", None), ("float32", 20.0))
    if growth in SOME or (dtype, noise) == ("float64", 20.0)
]


def trained(model: str, dtype: torch.dtype) -> tuple[Transformer, ShardedAdamW]:
    """A model after real steps, every weight away from its initial value."""
    out = model_of(spec_of(**MODELS[model]), grid(), dtype)
    optimizer = optimizer_of(out)
    train(out, optimizer, 3)
    return out, optimizer


def check_same(before: torch.Tensor, after: torch.Tensor, dtype: torch.dtype) -> None:
    size = float(before.abs().max())
    assert size > 0.1
    difference = float((before - after).abs().max())
    assert difference < (1e-10 if dtype == torch.float64 else 1e-5 * size)


@pytest.mark.parametrize(("model", "growth", "precision", "noise"), CASES)
def test_no_logit_changes(model: str, growth: str, precision: str, noise: float | None) -> None:
    dtype = getattr(torch, precision)
    tokens, domain, _ = text(3, seed=99)
    # The second growth is uneven wherever the first one was not.
    first, heads = ({**GROWTHS, **GROUPS}[growth], 24 if growth in GROUPS else 10)
    current, optimizer = trained(model, dtype)
    sizes = config_of(**MODELS[model]).model
    for step, grow in enumerate((first, {"heads": heads, "mlp": 131, "layers": 7})):
        plan, sizes = plan_of(current.spec, sizes, grow, noise_db=noise)
        assert plan.exact and plan.reason is None
        before = logits(current, tokens, domain)
        current, optimizer, received = apply(plan, current, optimizer.moments)
        assert received == 0
        check_same(before, logits(current, tokens, domain), dtype)
        assert (current.spec.layers, current.spec.mlp) == (sizes.layers, sizes.mlp_size)
        assert all(loss < 20 for loss in train(current, optimizer, 1, seed=step + 1))
        assert float((before - logits(current, tokens, domain)).abs().max()) > 1e-4  # and it learns


WIDTHS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "replicate": ({"heads": 8, "mlp": 57}, {"width": "replicate"}),
    "weighted": ({"heads": 6}, {"width": "weighted"}),
    "iso": ({"heads": 6, "mlp": 57}, {"width": "iso"}),
    "iso, divisible": ({"heads": 8}, {"width": "iso"}),
}


@pytest.mark.parametrize("width", WIDTHS)
def test_a_strategy_asked_for_by_name(width: str) -> None:
    grow, growth = WIDTHS[width]
    tokens, domain, _ = text(3, seed=99)
    for model in MODELS:
        rms = model.startswith("llama")
        if width != "replicate" and rms is not width.startswith("iso"):
            continue
        old, optimizer = trained(model, torch.float64)
        plan, _ = plan_of(old.spec, config_of(**MODELS[model]).model, grow, **growth)
        assert (plan.width, plan.exact) == (growth["width"], True)
        before = logits(old, tokens, domain)
        new, _, _ = apply(plan, old, optimizer.moments)
        check_same(before, logits(new, tokens, domain), torch.float64)


def test_auto_takes_what_is_exact_for_the_family() -> None:
    for model, heads, width, depth in (
        ("bert", 8, "replicate", "gate"),
        ("bert", 6, "weighted", "gate"),
        ("gpt", 8, "replicate", "zero_out"),
        ("gpt", 6, "lemon", "zero_out"),
        ("llama", 8, "zero_pad", "zero_out"),
        ("llama", 6, "zero_pad", "zero_out"),
    ):
        config = config_of(**MODELS[model])
        plan, _ = plan_of(spec_of(**MODELS[model]), config.model, {"heads": heads, "layers": 3})
        assert (plan.width, plan.depth, plan.moments) == (width, depth, "scaled")
        assert plan.new.weighted_norms is (width == "weighted")
        ratio = 32 / (8 * heads) if width in ("zero_pad", "lemon") else 1.0  # the mean square, or the variance, shrinks
        assert plan.new.norm_eps == pytest.approx(plan.old.norm_eps * ratio, rel=1e-14)
    weighted, sizes = plan_of(spec_of("gpt"), config_of("gpt").model, {"heads": 6}, width="weighted")
    assert plan_of(weighted.new, sizes, {"heads": 8})[0].width == "weighted"  # lemon wants plain statistics


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("grow", [{"heads": 6, "mlp": 57}, {"heads": 12, "mlp": 80}])
def test_weights_and_moments_are_those_of_the_tables(model: str, grow: dict[str, int]) -> None:
    old = model_of(spec_of(**MODELS[model]), grid())
    optimizer = optimizer_of(old)
    scatter_moments(old, optimizer, seed=5, step=9)
    plan, _ = copying_plan_of(old.spec, config_of(**MODELS[model]).model, grow, noise_db=None)
    before, state = weights(old), moments(optimizer)
    new, grown_optimizer, _ = apply(plan, old, optimizer.moments)
    tables = Growth(plan.old, plan.new, plan.width == "iso")
    got, new_state = weights(new), moments(grown_optimizer)
    for name, weight in before.items():
        for what, actual, expected in (
            ("weight", got[name], tables.weight(name, weight)),
            ("exp_avg", new_state[f"{name}.exp_avg"], tables.gradient(name, state[f"{name}.exp_avg"])),
            ("exp_avg_sq", new_state[f"{name}.exp_avg_sq"], tables.gradient(name, state[f"{name}.exp_avg_sq"], 2)),
        ):
            assert actual.shape == expected.shape, (name, what)
            torch.testing.assert_close(actual, expected, rtol=1e-14, atol=0, msg=f"{name} {what}")
        assert float(new_state[f"{name}.step"]) == 9
    if plan.new.weighted_norms:
        stats = new.norm_stats
        assert stats is not None and float(stats.sum()) == pytest.approx(1, abs=1e-14)
        embed = tables.embed("write")
        torch.testing.assert_close(stats, torch.from_numpy(1 / (embed.n * plan.old.embed)))


@pytest.mark.parametrize("model", MODELS)
def test_growing_by_nothing_changes_no_bit(model: str) -> None:
    for first in ({}, {"heads": 6, "layers": 3}):  # a fresh model, and one with weighted norms, iso or gates in it
        old, optimizer = trained(model, torch.float64)
        sizes = config_of(**MODELS[model]).model
        if first:
            plan, sizes = plan_of(old.spec, sizes, first)
            old, optimizer, _ = apply(plan, old, optimizer.moments)
            train(old, optimizer, 1)
        for growth in ({}, {"width": "elle", "depth": "elle"}, {"moments": "reset"}):
            plan, _ = plan_of(old.spec, sizes, {}, **growth)
            assert plan.exact and plan.new == plan.old
            new, grown_optimizer, _ = apply(plan, old, optimizer.moments)
            before, after = weights(old), weights(new)
            state, new_state = moments(optimizer), moments(grown_optimizer)
            assert list(before) == list(after)
            assert all(torch.equal(before[name], after[name]) for name in before)
            assert all(torch.equal(state[name], new_state[name]) for name in state)
            if old.norm_stats is not None and new.norm_stats is not None:
                assert torch.equal(old.norm_stats, new.norm_stats)


@pytest.mark.parametrize("model", ["bert", "gpt", "llama GQA"])
def test_growing_twice_is_growing_once_when_the_maps_compose(model: str) -> None:
    old, optimizer = trained(model, torch.float64)
    sizes = config_of(**MODELS[model]).model
    exact = {"width": "replicate", "noise_db": None}
    half, middle = plan_of(old.spec, sizes, {"heads": 8, "mlp": 80, "layers": 4}, **exact)
    one, one_optimizer, _ = apply(half, old, optimizer.moments)
    rest, _ = plan_of(one.spec, middle, {"heads": 16, "mlp": 160, "layers": 8}, **exact)
    two, two_optimizer, _ = apply(rest, one, one_optimizer.moments)
    whole, _ = plan_of(old.spec, sizes, {"heads": 16, "mlp": 160, "layers": 8}, **exact)
    direct, direct_optimizer, _ = apply(whole, old, optimizer.moments)
    assert two.spec == direct.spec
    ours, expected = weights(two), weights(direct)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    state, wanted = moments(two_optimizer), moments(direct_optimizer)
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)


def test_iso_composes_to_rounding() -> None:
    old, optimizer = trained("llama", torch.float64)
    sizes = config_of(**MODELS["llama"]).model
    growth = {"width": "iso", "noise_db": None}
    half, middle = plan_of(old.spec, sizes, {"heads": 8}, **growth)
    one, one_optimizer, _ = apply(half, old, optimizer.moments)
    rest, _ = plan_of(one.spec, middle, {"heads": 16}, **growth)
    two, _, _ = apply(rest, one, one_optimizer.moments)
    whole, _ = plan_of(old.spec, sizes, {"heads": 16}, **growth)
    direct, _, _ = apply(whole, old, optimizer.moments)
    assert rest.new.norm_eps == pytest.approx(whole.new.norm_eps, rel=1e-14)
    got = weights(two)
    for name, weight in weights(direct).items():
        torch.testing.assert_close(got[name], weight, rtol=1e-14, atol=0)


def plan_with(model: str, grow: dict[str, int], **growth: Any) -> GrowthPlan:
    return plan_of(spec_of(**MODELS[model]), config_of(**MODELS[model]).model, grow, **growth)[0]


@pytest.mark.parametrize("model", ["bert", "gpt", "llama GQA"])
def test_the_paper_s_recipe_says_that_it_is_not_exact_and_is_not(model: str) -> None:
    tokens, domain, _ = text(3, seed=99)
    old, optimizer = trained(model, torch.float64)
    before = logits(old, tokens, domain)
    sizes = config_of(**MODELS[model]).model
    for grow, growth, word in (
        ({"heads": 6}, {"width": "elle"}, "random maps"),
        ({"mlp": 57}, {"width": "elle"}, "random maps"),
        ({"layers": 3}, {"depth": "elle"}, "not the identity"),
        ({"heads": 6, "layers": 3}, {"width": "elle", "depth": "elle"}, "; "),
    ):
        plan, _ = plan_of(old.spec, sizes, grow, **growth)
        assert not plan.exact and word in str(plan.reason)
        assert plan.summary()["exact"] is False and plan.summary()["reason"] == plan.reason
        assert plan.moments == "reset"
        new, new_optimizer, _ = apply(plan, old, optimizer.moments)
        assert float((before - logits(new, tokens, domain)).abs().max()) > 1e-3
        assert not any(tensor.any() for tensor in moments(new_optimizer).values())
        assert train(new, new_optimizer, 2)[-1] < 20


def test_the_paper_s_layers_are_duplicated_once_per_doubling() -> None:
    spec, sizes = spec_of("gpt", layers=3), config_of("gpt", layers=3).model
    seen = set()
    for layers in (4, 5, 6):
        plan, sizes = plan_of(spec, sizes, {"layers": layers}, depth="elle")
        source = list(plan.layer_source)
        assert source == sorted(source) and set(source) == set(range(spec.layers))
        (doubled,) = {layer for layer in source if source.count(layer) == 2}
        original = spec.lineage[doubled]
        assert original not in seen
        seen.add(original)
        spec = plan.new
    assert seen == {0, 1, 2} and spec.lineage == tuple(range(6)) and spec.duplicated == ()
