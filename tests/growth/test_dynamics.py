"""Training goes on after growth: gradients, moments and AdamW's steps map (growth.md, 1.3); copies separate (1.4)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from elle_mp.growth.apply import Moments
from elle_mp.growth.plan import GrowthPlan
from elle_mp.models.transformer import Transformer
from elle_mp.parallel.sharding import local_tensor
from tests.growth.oracle import Growth
from tests.tiny import (
    FAMILIES,
    apply,
    config_of,
    gradients,
    grid,
    model_of,
    optimizer_of,
    plan_of,
    spec_of,
    text,
    train,
    weights,
)

GROW = {"heads": 6, "mlp": 57}
LR, BETAS, EPS, DECAY = 3e-3, (0.9, 0.98), 1e-8, 0.1

Factors = Mapping[str, tuple[Tensor, Tensor]]


MODELS: dict[str, dict[str, Any]] = {
    "bert": {"family": "bert"},
    "gpt": {"family": "gpt"},
    "gpt untied": {"family": "gpt", "tied": False},
    "llama GQA": {"family": "llama", "kv_groups": 2},
    "llama tied": {"family": "llama", "kv_groups": None, "tied": True},
}


def oracle_of(plan: GrowthPlan) -> Growth:
    return Growth(plan.old, plan.new, iso=plan.width == "iso")


def adamw(model: Transformer, state: dict[str, Moments], steps: int, factors: Factors | None = None) -> list[float]:
    """AdamW with ``lr' = s lr``, ``eps' = r eps``, ``wd' = wd / s`` for every entry; returns the losses."""
    losses = []
    for step in range(steps):
        tokens, domain, targets = text(4, seed=500 + step)
        loss = model(tokens, domain, targets) / targets.numel()
        loss.backward()
        losses.append(float(loss.detach()))
        for name, parameter in model.named_parameters():
            s, r = (torch.ones(()), torch.ones(())) if factors is None else factors[name]
            grad, value, moments = local_tensor(parameter.grad), local_tensor(parameter).detach(), state[name]
            moments.step += 1
            moments.first.lerp_(grad, 1 - BETAS[0])
            moments.second.mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
            first = moments.first / (1 - BETAS[0] ** float(moments.step))
            second = moments.second / (1 - BETAS[1] ** float(moments.step))
            value.mul_(1 - LR * DECAY).sub_(LR * s * first / (second.sqrt() + EPS * r))
            parameter.grad = None
    return losses


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("grow", [GROW, {"heads": 8, "mlp": 80}], ids=["any width", "doubled"])
def test_gradients_of_copies_are_r_times_the_source_s(model_name: str, grow: dict[str, int]) -> None:
    """``G' = r G``: a wrong scale anywhere in forward or backward shows here."""
    sizes = MODELS[model_name]
    old = model_of(spec_of(**sizes), grid())
    grow = grow | ({"kv_groups": grow["heads"] // 2} if sizes.get("kv_groups") else {})
    plan, _ = plan_of(old.spec, config_of(**sizes).model, grow, noise_db=None)
    new, _, _ = apply(plan, old, optimizer_of(old).moments)
    tokens, domain, targets = text(4)
    for model in (old, new):
        model(tokens, domain, targets).backward()
    oracle, before, after = oracle_of(plan), gradients(old), gradients(new)
    for name, gradient in after.items():
        wanted = oracle.gradient(name, before[name])
        assert (gradient - wanted).abs().max() < 1e-10 * max(1.0, float(wanted.abs().max())), name


@pytest.mark.parametrize("model_name", MODELS)
def test_fifteen_adamw_steps_commute_with_growth(model_name: str) -> None:
    """Growing and then stepping is stepping and then growing; with the moments dropped it is not."""
    old = model_of(spec_of(**MODELS[model_name]), grid())
    optimizer = optimizer_of(old)
    train(old, optimizer, 6)
    plan, _ = plan_of(old.spec, config_of(**MODELS[model_name]).model, GROW, noise_db=None)
    oracle = oracle_of(plan)
    new, new_optimizer, _ = apply(plan, old, optimizer.moments)
    reset, reset_optimizer, _ = apply(plan, old, optimizer.moments)
    reset_optimizer.reset()
    factors = {name: oracle.factors(name) for name, _ in new.named_parameters()}
    wanted = adamw(old, copy.deepcopy(optimizer.moments), 15)
    got = adamw(new, new_optimizer.moments, 15, factors)
    without = adamw(reset, reset_optimizer.moments, 15, factors)
    assert max(abs(a - b) for a, b in zip(wanted, got, strict=True)) < 1e-8
    assert max(abs(a - b) for a, b in zip(wanted, without, strict=True)) > 1e-4
    small, large = weights(old), weights(new)
    for name, value in large.items():
        assert (value - oracle.weight(name, small[name])).abs().max() < 1e-8, name


def test_step_counts_go_on_where_moments_do_and_restart_in_new_layers() -> None:
    """A zero moment beside an old step count would lose its bias correction (growth.md, 1.3)."""
    old = model_of(spec_of("gpt"), grid())
    optimizer = optimizer_of(old)
    train(old, optimizer, 3)
    plan, _ = plan_of(old.spec, config_of("gpt").model, {"layers": 3, "heads": 6})
    _, grown, _ = apply(plan, old, optimizer.moments)
    for name, state in grown.moments.items():
        added = name.startswith("layers.") and plan.inserted[int(name.split(".")[1])]
        assert float(state.step) == (0 if added else 3), name
        assert bool(state.second.any()) is not added, name
    plan, _ = plan_of(old.spec, config_of("gpt").model, {"heads": 6}, moments="reset")
    _, dropped, _ = apply(plan, old, optimizer.moments)
    assert not any(bool(state.step) or bool(state.first.any()) for state in dropped.moments.values())


def copies_apart(family: str, grow: dict[str, int], noise_db: float | None, steps: int) -> tuple[float, float]:
    """Largest relative distances of the two copies of an MLP unit and of a head after growth and some real steps."""
    old = model_of(spec_of(family, **({"kv_groups": 4} if family == "llama" else {})), grid())
    optimizer = optimizer_of(old)
    train(old, optimizer, 3)
    sizes = config_of(family, **({"kv_groups": 4} if family == "llama" else {})).model
    plan, _ = plan_of(old.spec, sizes, grow, noise_db=noise_db)
    new, grown, _ = apply(plan, old, optimizer.moments)
    train(new, grown, steps, seed=3)
    value = weights(new)
    apart = []
    for name, units in (("mlp.in_weight", plan.old.mlp), ("attention.qkv_weight", plan.old.kv_groups)):
        rows = value[f"layers.0.{name}"]
        pairs = rows.reshape(units, rows.shape[0] // (units * 2) * 2, -1).view(units, 2, -1)
        apart.append(float(((pairs[:, 0] - pairs[:, 1]).norm(dim=-1) / pairs[:, 0].norm(dim=-1)).max()))
    return apart[0], apart[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_separate_with_noise_and_stay_locked_without(family: str) -> None:
    both = {"heads": 8, "kv_groups": 8, "mlp": 80} if family == "llama" else {"heads": 8, "mlp": 80}
    assert max(copies_apart(family, both, None, 10)) < 1e-9
    assert min(copies_apart(family, both, 20.0, 10)) > 1e-3
    # Where the width stays, units are told apart by what reads them alone: their own rows are equal at first.
    assert copies_apart(family, {"mlp": 80}, 20.0, 0)[0] == 0.0
    assert copies_apart(family, {"mlp": 80}, 20.0, 10)[0] > 1e-3
    assert copies_apart(family, {"mlp": 80}, None, 10)[0] < 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_noise_cancels_over_copies_and_has_the_strength_asked_for(family: str) -> None:
    old = model_of(spec_of(family), grid())
    grow = {"heads": 8, "mlp": 80}
    grown = {}
    for noise in (None, 20.0):
        plan, _ = plan_of(old.spec, config_of(family).model, grow, noise_db=noise)
        grown[noise], _, _ = apply(plan, old, optimizer_of(old).moments)
    clean, noisy = weights(grown[None]), weights(grown[20.0])
    for name, units in (("layers.0.mlp.out_weight", 40), ("layers.0.attention.qkv_weight", 32)):
        noise = noisy[name] - clean[name]
        assert noise.view(-1, units, 2).sum(-1).abs().max() < 1e-15
        # Two copies share the noise, +x and -x, so half of its power is left after it is centred.
        ratio = noise / clean[name]
        assert 0.9 < float(ratio.square().mean().sqrt()) / (0.1 * 0.5**0.5) < 1.1
        # A number of its own for every row: a scalar split would be divided out by Adam (section 1.4).
        assert float(torch.corrcoef(ratio[:12, ::2]).fill_diagonal_(0).abs().max()) < 0.8
    for name, value in clean.items():
        reads = name.endswith(("weight", "output_table")) and "norm" not in name
        assert torch.equal(noisy[name], value) is not reads, name
