"""Every layout trains the same model: losses, gradient norms, every gradient and every weight, through a growth."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch

from elle_mp.data.batches import Batch
from elle_mp.models.build import Precision, empty_model
from elle_mp.models.transformer import IGNORED
from elle_mp.parallel.sharding import initialise
from elle_mp.train.trainer import Trainer, rows_of
from tests.distributed_utils import run_distributed
from tests.tiny import (
    FAMILIES,
    TEXT,
    apply,
    config_of,
    gradients,
    grid,
    model_of,
    moments,
    optimizer_of,
    plan_of,
    scatter_moments,
    spec_of,
    text,
    weights,
)

ROWS, STEPS = 4, 10
COMPARED = (0, 1, 2, 9, 10, 11, 12, 19)
"""Steps whose gradients are compared: around both starts and at both ends, some with rows that predict nothing."""
LAYOUTS = {
    "tp2": {"tp": 2},
    "dp_shard2": {"dp_shard": 2},
    "dp_replicate2": {"dp_replicate": 2},
    "tp2 x dp_shard2": {"tp": 2, "dp_shard": 2},
}
RANKS = {name: prod(layout.values()) for name, layout in LAYOUTS.items()}
GROW = {"layers": 3, "heads": 6, "mlp": 60}


def global_batch(step: int) -> Batch:
    """Targets unevenly spread: the first rows predict almost nothing, and in every third step nothing at all."""
    tokens, domain, targets = text(ROWS, seed=step)
    targets[0, 1:] = IGNORED
    targets[1, TEXT // 2 :] = IGNORED
    if step % 3 == 0:
        targets[: ROWS // 2] = IGNORED
    return Batch(tokens, targets, domain, torch.arange(ROWS) + ROWS * step)


def run(family: str, layout: dict[str, int], dropout: float) -> dict[str, Any]:
    """Twenty steps with a growth in the middle; what rank 0 saw, tensors whole."""
    place = grid(**layout)
    config = config_of(family, dropout=dropout)
    model = model_of(spec_of(family, dropout=dropout), place, spread=0.05)
    optimizer = optimizer_of(model, lr=3e-3)
    seen: dict[str, Any] = {"loss": [], "norm": [], "gradients": {}, "first weights": weights(model)}
    for step in range(2 * STEPS):
        if step == STEPS:
            plan, _ = plan_of(model.spec, config.model, GROW)
            model, optimizer, _ = apply(plan, model, optimizer.moments, lr=3e-3)
        trainer = Trainer(model, optimizer, micro=1, dropout_seed=3)
        inner = optimizer.step

        def recording(factor: float, after: Any, inner: Any = inner, model: Any = model, step: int = step) -> float:
            if step in COMPARED:
                seen["gradients"][step] = gradients(model)
            return inner(factor, after)

        optimizer.step = recording  # type: ignore[method-assign]
        first, last = rows_of(place, ROWS)
        result = trainer.step(global_batch(step).rows(first, last), 1.0)
        optimizer.step = inner  # type: ignore[method-assign]
        seen["loss"].append(result.loss)
        seen["norm"].append(result.grad_norm)
    seen["weights"] = weights(model)
    # Every rank has gathered the same tensors: one copy goes to the test.
    if torch.distributed.get_rank() > 0:
        return {key: seen[key] for key in ("loss", "norm")}
    return seen


CASES = [("gpt", 0.0, name) for name in LAYOUTS]
CASES += [("bert", 0.1, "tp2"), ("bert", 0.1, "tp2 x dp_shard2"), ("bert", 0.0, "dp_shard2")]
CASES += [("llama", 0.1, "tp2"), ("llama", 0.0, "dp_shard2"), ("llama", 0.0, "tp2 x dp_shard2")]
CASES += [("gpt", 0.1, "tp2 x dp_shard2")]


@pytest.fixture(scope="module")
def one_process() -> Any:
    """The same run on one rank, once for each family and dropout."""
    known: dict[tuple[str, float], dict[str, Any]] = {}

    def get(family: str, dropout: float) -> dict[str, Any]:
        if (family, dropout) not in known:
            known[family, dropout] = run_distributed(run, 1, family, {}, dropout)[0]
        return known[family, dropout]

    return get


@pytest.mark.distributed
@pytest.mark.parametrize(("family", "dropout", "layout"), CASES)
def test_every_gradient_is_that_of_one_process(family: str, dropout: float, layout: str, one_process: Any) -> None:
    wanted = one_process(family, dropout)
    ranks = run_distributed(run, RANKS[layout], family, LAYOUTS[layout], dropout)
    for got in ranks:
        assert got["loss"] == pytest.approx(wanted["loss"], rel=1e-9)
        assert got["norm"] == pytest.approx(wanted["norm"], rel=1e-9)
    got = ranks[0]
    assert len(got["loss"]) == 2 * STEPS and tuple(got["gradients"]) == COMPARED
    for step, theirs in wanted["gradients"].items():
        ours = got["gradients"][step]
        assert ours.keys() == theirs.keys()
        assert got["norm"][step] == pytest.approx(float(sum(g.square().sum() for g in ours.values())) ** 0.5, rel=1e-12)
        for name, gradient in theirs.items():
            # A tensor whose gradient cancels to almost nothing is held to the scale of the others.
            largest = max(float(gradient.abs().max()), 1e-3 * max(float(g.abs().max()) for g in theirs.values()))
            assert float((ours[name] - gradient).abs().max()) <= 1e-9 * largest, name
    for name, weight in wanted["weights"].items():
        assert float((got["weights"][name] - weight).abs().max()) <= 1e-9 * float(weight.abs().max()), name
        # What is drawn is drawn by global index: equal to the last bit, before any step.
        if name in wanted["first weights"]:
            assert torch.equal(got["first weights"][name], wanted["first weights"][name]), name


def grown_tensors(
    family: str,
    layout: dict[str, int],
    growth: dict[str, Any],
    grow: dict[str, int],
    sizes: dict[str, Any] | None = None,
) -> Any:
    """Grown weights and moments, whole, with the bytes received and the collectives issued while growing."""
    from torch.distributed.tensor.debug import CommDebugMode

    sizes = sizes or {}
    model = model_of(spec_of(family, **sizes), grid(**layout), dtype=torch.float32)
    optimizer = optimizer_of(model)
    scatter_moments(model, optimizer, 5, 7)
    plan, _ = plan_of(model.spec, config_of(family, **sizes).model, grow, **growth)
    with CommDebugMode() as counter:
        new, grown, received = apply(plan, model, optimizer.moments)
    return weights(new) | moments(grown), received, counter.get_total_counts()


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["tp2", "dp_shard2", "tp2 x dp_shard2"])
@pytest.mark.parametrize("family", ["bert", "gpt", "llama"])
def test_growth_is_local_and_bitwise_the_same_under_every_layout(family: str, layout: str) -> None:
    """Noise included; cuts that align with the maps need no collective (growth.md, section 2)."""
    wanted, _, _ = run_distributed(grown_tensors, 1, family, {}, {}, GROW | {"heads": 8})[0]
    for got, received, collectives in run_distributed(
        grown_tensors, RANKS[layout], family, LAYOUTS[layout], {}, GROW | {"heads": 8}
    ):
        for name, tensor in wanted.items():
            assert torch.equal(got[name], tensor), name
        # Four shards cut llama's two groups in half, and a group's queries grow: those rows come from a neighbour.
        aligned = (family, layout) != ("llama", "tp2 x dp_shard2")
        assert (received == 0, collectives == 0) == (aligned, aligned)


@pytest.mark.distributed
def test_cuts_that_do_not_align_are_gathered_and_counted() -> None:
    """The paper's random maps leave their rank: still the same tensors, and the record says what it cost."""
    growth = {"width": "elle", "depth": "elle", "moments": "scaled"}
    wanted, _, _ = run_distributed(grown_tensors, 1, "gpt", {}, growth, {"heads": 6})[0]
    for got, received, collectives in run_distributed(grown_tensors, 2, "gpt", {"tp": 2}, growth, {"heads": 6}):
        assert received > 0 and collectives > 0
        for name, tensor in wanted.items():
            assert torch.equal(got[name], tensor), name


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("family", "sizes"), [("bert", {"heads": 3, "mlp": 21}), ("llama", {"heads": 3, "kv_groups": 3})]
)
def test_odd_sizes_under_sharding_are_gathered_where_they_must(family: str, sizes: dict[str, Any]) -> None:
    """FSDP2's chunks of odd rows do not map onto each other: the tensors are the same, noise included."""
    grow = {"heads": 5, "mlp": 67, "layers": 3} | ({"kv_groups": 5} if family == "llama" else {})
    wanted, none, _ = run_distributed(grown_tensors, 1, family, {}, {}, grow, sizes)[0]
    assert none == 0
    for got, received, collectives in run_distributed(grown_tensors, 2, family, {"dp_shard": 2}, {}, grow, sizes):
        assert received > 0 and collectives > 0
        for name, tensor in wanted.items():
            assert torch.equal(got[name], tensor), name


def drawn(layout: dict[str, int]) -> dict[str, torch.Tensor]:
    """A new model of each family; their weights, whole."""
    place, out = grid(**layout), {}
    for family in FAMILIES:
        sizes = {"kv_groups": 4} if family == "llama" else {}
        model = empty_model(spec_of(family, **sizes), place, Precision(torch.float32, torch.float32))
        initialise(model, 3)
        out.update({f"{family} {name}": tensor for name, tensor in weights(model).items()})
    return out


@pytest.mark.distributed
def test_initial_weights_are_the_same_to_the_last_bit() -> None:
    """And so what a rank holds is what the declarations say: the values are drawn for just those entries."""
    wanted = run_distributed(drawn, 1, {})[0]
    for family in FAMILIES:
        assert 0.019 < float(wanted[f"{family} token_table"].std()) < 0.021
        # 0.02 / sqrt(2 layers), two layers
        assert float(wanted[f"{family} layers.0.mlp.out_weight"].std()) == pytest.approx(0.01, rel=0.1)
    for layout in (*LAYOUTS.values(), {"tp": 4}, {"dp_shard": 4}):
        for got in run_distributed(drawn, prod(layout.values()), layout):
            assert got.keys() == wanted.keys()
            for name, tensor in wanted.items():
                assert torch.equal(got[name], tensor), name
