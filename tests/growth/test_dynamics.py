"""Training goes on after growth: gradients, moments and AdamW's steps map (growth.md, 1.3); copies separate (1.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from elle_mp.config import ModelConfig, OptimConfig
from elle_mp.growth.apply import grow_on_shards
from elle_mp.growth.factors import After
from elle_mp.growth.plan import GrowthPlan
from elle_mp.growth.rates import factors_of
from elle_mp.models.build import Precision, empty_model
from elle_mp.models.declarations import declarations
from elle_mp.models.transformer import Transformer
from elle_mp.train.optimizer import ShardedAdamW
from tests.growth.oracle import Growth
from tests.tiny import (
    FAMILIES,
    MODELS,
    PLAIN,
    apply,
    config_of,
    copying_plan_of,
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
# An epsilon so large that its factors matter, and no clipping: the norm of a grown gradient is another one.
OPTIM = OptimConfig(lr=3e-3, eps=1e-5, weight_decay=0.1, clip=0)
STEPS = 15
LEARNS, RESTS = After(), After(new_factor=0.0)

GROWN = ("bert", "gpt", "gpt untied", "llama", "llama tied", "llama GQA")

FOLLOWED: dict[str, list[dict[str, int]]] = {
    "uneven": [{"heads": 6, "mlp": 57}],
    "whole multiples": [{"heads": 8, "mlp": 120}],
    "twice": [{"heads": 6, "mlp": 57}, {"heads": 10, "mlp": 80}],
    "twice, whole multiples": [{"heads": 8, "mlp": 80}, {"heads": 16, "mlp": 160}],
}
GROUPED: dict[str, list[dict[str, int]]] = {
    "uneven": [{"heads": 9, "kv_groups": 3, "mlp": 57}],
    "whole multiples": [{"heads": 8, "kv_groups": 4, "mlp": 120}],
    "twice": [{"heads": 6, "kv_groups": 3, "mlp": 57}, {"heads": 20, "kv_groups": 5, "mlp": 80}],
    "twice, whole multiples": [{"heads": 8, "kv_groups": 4, "mlp": 80}, {"heads": 16, "kv_groups": 4, "mlp": 160}],
}


@dataclass
class Training:
    """A model under AdamW, and the growths that it has been through."""

    model: Transformer
    optimizer: ShardedAdamW
    sizes: ModelConfig
    lineage: tuple[GrowthPlan, ...] = ()

    def train(self, first: int, last: int, after: After = LEARNS) -> list[float]:
        """The losses of steps ``[first, last)``, each on text of its own."""
        losses = []
        for step in range(first, last):
            tokens, domain, targets = text(4, seed=500 + step)
            loss = self.model(tokens, domain, targets) / targets.numel()
            loss.backward()
            self.optimizer.step(1.0, after)
            losses.append(float(loss.detach()))
        return losses

    def grown(self, grow: dict[str, int], **growth: Any) -> Training:
        """The larger model; its optimizer has the rates of all its growths. This one stays as it is."""
        plan, sizes = copying_plan_of(self.model.spec, self.sizes, grow, **PLAIN | growth)
        assert plan.exact
        larger = empty_model(plan.new, self.model.grid, Precision(torch.float64, torch.float64))
        lineage = (*self.lineage, plan)
        optimizer = ShardedAdamW(larger, OPTIM, factors_of(lineage, declarations))
        grow_on_shards(plan, self.model, larger, self.optimizer.moments, optimizer.moments)
        return Training(larger, optimizer, sizes, lineage)


def small(name: str, **changes: Any) -> Training:
    """A model after a few steps: its moments are real."""
    sizes = MODELS[name] | changes
    model = model_of(spec_of(**sizes), grid())
    out = Training(model, ShardedAdamW(model, OPTIM), config_of(**sizes).model)
    out.train(-6, 0)
    return out


def apart(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest difference of two runs' losses."""
    assert len(one) == len(other) and max(one) > 1
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def check_weights(larger: Training, wanted: Training) -> None:
    """Every weight and moment of one model against another's."""
    got_weights = weights(larger.model)
    for name, value in weights(wanted.model).items():
        assert (got_weights[name] - value).abs().max() < 1e-8, name
    for name, state in wanted.optimizer.moments.items():
        got = larger.optimizer.moments[name]
        assert float(got.step) == float(state.step), name
        for ours, theirs in ((got.first, state.first), (got.second, state.second)):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-10, msg=name)


@pytest.mark.parametrize("model_name", GROWN)
@pytest.mark.parametrize("grow", [GROW, {"heads": 8, "mlp": 80}], ids=["any width", "doubled"])
def test_gradients_of_copies_are_r_times_the_source_s(model_name: str, grow: dict[str, int]) -> None:
    """``G' = r G``: a wrong scale anywhere in forward or backward shows here."""
    sizes = MODELS[model_name]
    old = model_of(spec_of(**sizes), grid())
    grow = grow | ({"kv_groups": grow["heads"] // 2} if sizes.get("kv_groups") else {})
    plan, _ = copying_plan_of(old.spec, config_of(**sizes).model, grow, noise_db=None)
    new, _, _ = apply(plan, old, optimizer_of(old).moments)
    tokens, domain, targets = text(4)
    for model in (old, new):
        model(tokens, domain, targets).backward()
    oracle, before, after = Growth(plan.old, plan.new, plan.width == "iso"), gradients(old), gradients(new)
    for name, gradient in after.items():
        wanted = oracle.gradient(name, before[name])
        assert (gradient - wanted).abs().max() < 1e-10 * max(1.0, float(wanted.abs().max())), name


@pytest.mark.parametrize("how", FOLLOWED)
@pytest.mark.parametrize("name", GROWN)
def test_training_follows_the_model_that_did_not_grow(name: str, how: str) -> None:
    """Growing and then stepping is stepping and then growing, through as many growths as there are.

    A second growth comes in the middle: rates of both multiply, and its moments have seen steps at the first one's.
    """
    old = small(name)
    growths = (GROUPED if MODELS[name].get("kv_groups") else FOLLOWED)[how]
    after = old
    got: list[float] = []
    for index, grow in enumerate(growths):
        after = after.grown(grow)
        got += after.train(len(got), STEPS if index == len(growths) - 1 else 5)
    wanted = old.train(0, STEPS)
    assert apart(wanted, got) < 1e-8
    for grow in growths:
        old = old.grown(grow)
    check_weights(after, old)


@pytest.mark.parametrize("name", ["bert", "gpt", "llama GQA"])
def test_without_moments_or_rates_training_goes_elsewhere(name: str) -> None:
    """What each of the two does: without it the losses part."""
    old = small(name)
    grow = GROUPED["uneven"][0] if MODELS[name].get("kv_groups") else GROW
    losses = {
        (moments, rate): old.grown(grow, moments=moments, rate=rate).train(0, STEPS)
        for moments, rate in (("scaled", "mup"), ("reset", "mup"), ("asym_reset", "mup"), ("scaled", "keep"))
    }
    wanted = old.train(0, STEPS)
    assert apart(wanted, losses.pop(("scaled", "mup"))) < 1e-8
    for choice, got in losses.items():
        assert got[0] == pytest.approx(wanted[0], abs=1e-12)
        assert apart(wanted, got) > 1e-4, choice


ADDED: dict[str, dict[str, int]] = {
    "longer heads": {"head_dim": 12},
    "layers": {"layers": 3},
    "longer context, more ids": {"seq_len": 20, "vocab": 400},
}


@pytest.mark.parametrize("what", ADDED)
@pytest.mark.parametrize("name", ["bert", "gpt", "llama GQA"])
def test_beside_what_is_added_the_old_goes_on_as_it_would(name: str, what: str) -> None:
    """New channels, layers, positions and ids learn by themselves; while they rest, the old entries' steps commute."""
    old = small(name, width=32)
    after, learning = old.grown(ADDED[what]), old.grown(ADDED[what])
    wanted = old.train(0, STEPS)
    assert apart(wanted, after.train(0, STEPS, RESTS)) < 1e-8
    if what in ("longer heads", "layers"):
        assert apart(wanted, learning.train(0, STEPS)) > 1e-4


@pytest.mark.parametrize(("name", "grow"), [("llama", {"heads": 6, "mlp": 57}), ("gpt", {"mlp": 57, "heads": 6})])
def test_beside_padding_the_old_goes_on_as_it_would(name: str, grow: dict[str, int]) -> None:
    """Of ``zero_pad`` too: what is new is read or written with zeros, while it rests."""
    old = small(name, **({"width": 32} if name == "gpt" else {}))
    after, learning = old.grown(grow, width="zero_pad"), old.grown(grow, width="zero_pad")
    wanted = old.train(0, STEPS)
    assert apart(wanted, after.train(0, STEPS, RESTS)) < 1e-8
    assert apart(wanted, learning.train(0, STEPS)) > 1e-4


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


def copies_apart(family: str, grow: dict[str, int], steps: int, **growth: Any) -> tuple[float, float]:
    """Largest relative distances of the two copies of an MLP unit and of a head after growth and some real steps."""
    sizes = {"kv_groups": 4} if family == "llama" else {}
    old = model_of(spec_of(family, **sizes), grid())
    optimizer = optimizer_of(old)
    train(old, optimizer, 3)
    plan, _ = plan_of(old.spec, config_of(family, **sizes).model, grow, **{"width": "replicate"} | growth)
    new, grown, _ = apply(plan, old, optimizer.moments)
    train(new, grown, steps, seed=3)
    value = weights(new)
    distances = []
    for name, units in (("mlp.in_weight", plan.old.mlp), ("attention.qkv_weight", plan.old.kv_groups)):
        pairs = copies_of(value[f"layers.0.{name}"], units)
        distances.append(float(((pairs[0] - pairs[1]).norm(dim=-1) / pairs[0].norm(dim=-1)).max()))
    return distances[0], distances[1]


def copies_of(rows: Tensor, units: int) -> Tensor:
    """Both copies of every unit of a doubled axis, ``[2, units, entries]``."""
    return rows.reshape(units, 2, -1).transpose(0, 1)


def doubled(family: str) -> dict[str, int]:
    return {"heads": 8, "mlp": 80} | ({"kv_groups": 8} if family == "llama" else {})


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_stay_locked_without_noise_and_separate_with_it(family: str) -> None:
    both = doubled(family)
    assert max(copies_apart(family, both, 10, noise_db=None)) < 1e-9
    assert min(copies_apart(family, both, 10, noise_db=20.0)) > 1e-3
    # Where the width stays, units are told apart by what reads them alone: their own rows are equal at first.
    assert copies_apart(family, {"mlp": 80}, 0, noise_db=20.0)[0] == 0.0
    assert copies_apart(family, {"mlp": 80}, 10, noise_db=20.0)[0] > 1e-3
    assert copies_apart(family, {"mlp": 80}, 10, noise_db=None)[0] < 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_of_the_originals_alone_separate_copies_too(family: str) -> None:
    """SPARKLING's way, without noise: equal weights, unequal state. Dropping all moments separates nothing."""
    both = doubled(family)
    assert max(copies_apart(family, both, 0, noise_db=None, moments="asym_reset")) < 1e-12
    assert min(copies_apart(family, both, 10, noise_db=None, moments="asym_reset")) > 1e-3
    assert max(copies_apart(family, both, 10, noise_db=None, moments="reset")) < 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_block_diagonal_halves_stay_each_other_s_image(family: str) -> None:
    """Their weights are no copies any more, but swapping the halves everywhere changes nothing (growth.md, 1.4)."""
    sizes = {"kv_groups": 4} if family == "llama" else {}
    old = model_of(spec_of(family, **sizes), grid())
    optimizer = optimizer_of(old)
    train(old, optimizer, 3)
    grow = doubled(family)
    plan, _ = plan_of(old.spec, config_of(family, **sizes).model, grow, width="blockdiag", noise_db=None)
    new, grown, _ = apply(plan, old, optimizer.moments)
    train(new, grown, 20, seed=3)
    matrix = weights(new)["layers.0.mlp.out_weight"]
    halves = matrix.view(plan.old.embed, 2, plan.old.mlp, 2)
    swapped = halves.flip(1, 3)
    size = float(matrix.norm())
    assert float((halves - swapped).norm()) < 1e-9 * size
    assert float((halves[:, 0] - halves[:, 1]).norm()) > 0.1 * size  # the diagonal is not what lies beside it


@pytest.mark.parametrize("family", FAMILIES)
def test_noise_cancels_over_copies_and_has_the_strength_asked_for(family: str) -> None:
    old = model_of(spec_of(family), grid())
    grow = {"heads": 8, "mlp": 80}
    grown = {}
    for noise in (None, 20.0):
        plan, _ = copying_plan_of(old.spec, config_of(family).model, grow, noise_db=noise)
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
