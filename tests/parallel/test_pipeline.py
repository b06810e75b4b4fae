"""Pipelines train the model that one process trains: every schedule, with tensor and data parallel, through a growth
that moves layers from stage to stage."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
import torch.distributed as dist

from elle_mp.models.pipeline import Pipeline, add_tied_gradients, copy_tied, stage_of, stage_parts
from elle_mp.parallel.pipeline import balanced, parts_of
from elle_mp.parallel.sharding import copies_of
from elle_mp.train.trainer import Trainer, rows_of
from tests.distributed_utils import run_distributed
from tests.parallel.test_layouts import GROW, ROWS, global_batch
from tests.tiny import apply, config_of, gradients, grid, model_of, moments, optimizer_of, plan_of, spec_of, weights

STEPS = 3
LAYERS = 5
GROWN = GROW | {"layers": 7}


def run(family: str, layout: dict[str, Any], dropout: float, micro: int = 1) -> dict[str, Any]:
    """Some steps, a growth of width and depth, and as many again; what this rank saw of its parts, tensors whole."""
    place = grid(**layout)
    config = config_of(family, dropout=dropout, layers=LAYERS)
    model = model_of(spec_of(family, dropout=dropout, layers=LAYERS), place, spread=0.05)
    optimizer = optimizer_of(model, lr=3e-3)
    seen: dict[str, Any] = {"loss": [], "norm": [], "gradients": [], "ranges": [], "received": 0}
    for step in range(2 * STEPS):
        if step == STEPS:
            plan, _ = plan_of(model.spec, config.model, GROWN)
            model, optimizer, seen["received"] = apply(plan, model, optimizer.moments, lr=3e-3)
            optimizer.loaded()
            seen["grown"] = weights(model) | moments(optimizer)
        trainer = Trainer(model, optimizer, micro=micro, dropout_seed=3)
        inner = optimizer.step

        def recording(factor: float, after: Any, inner: Any = inner, model: Any = model) -> float:
            seen["gradients"].append(gradients(model))
            return inner(factor, after)

        optimizer.step = recording  # type: ignore[method-assign]
        first, last = rows_of(place, ROWS)
        result = trainer.step(global_batch(step).rows(first, last), 1.0)
        seen["loss"].append(result.loss)
        seen["norm"].append(result.grad_norm)
        seen["ranges"].append([list(part.part.layers) for part in model.parts])
    seen["weights"] = weights(model)
    return seen


def check_same(got: dict[str, Any], wanted: dict[str, Any], tolerance: float) -> None:
    """Every tensor that a rank has is that of one process, under its name there (the tied table has two)."""
    assert got["loss"] == pytest.approx(wanted["loss"], rel=tolerance)
    assert got["norm"] == pytest.approx(wanted["norm"], rel=tolerance)
    pairs = [(got["weights"], wanted["weights"]), (got["grown"], wanted["grown"])]
    pairs += list(zip(got["gradients"], wanted["gradients"], strict=True))
    for mine, theirs in pairs:
        # What has no gradient but rounding (behind a layer that is new and writes zeros) counts by the others.
        floor = max(float(tensor.abs().max()) for tensor in theirs.values())
        for name, tensor in mine.items():
            other = theirs[name] if name in theirs else theirs[name.replace("output_table", "token_table")]
            largest = max(float(other.abs().max()), 1e-3 * floor)
            assert float((tensor - other).abs().max()) < tolerance * largest, name


CASES = {
    "gpt, 1f1b": ("gpt", {"pp": 2}, 0.1),
    "gpt, gpipe": ("gpt", {"pp": 2, "schedule": "gpipe"}, 0.0),
    "gpt, interleaved": ("gpt", {"pp": 2, "schedule": "interleaved_1f1b"}, 0.1),
    "gpt, zero bubble": ("gpt", {"pp": 2, "schedule": "zero_bubble"}, 0.0),
    "gpt, zbv": ("gpt", {"pp": 2, "schedule": "zbv"}, 0.1),
    "bert, 1f1b": ("bert", {"pp": 2}, 0.1),
    "bert, zbv": ("bert", {"pp": 2, "schedule": "zbv"}, 0.0),
    "llama, zero bubble": ("llama", {"pp": 2, "schedule": "zero_bubble"}, 0.0),
    "gpt, three": ("gpt", {"pp": 3}, 0.0),
    "llama, tp2": ("llama", {"pp": 2, "tp": 2}, 0.1),
    "bert, dp_shard2": ("bert", {"pp": 2, "dp_shard": 2, "schedule": "zero_bubble"}, 0.0),
    "gpt, dp_replicate2": ("gpt", {"pp": 2, "dp_replicate": 2}, 0.0),
    "gpt, tp2 x dp_shard2": ("gpt", {"pp": 2, "tp": 2, "dp_shard": 2, "schedule": "zbv"}, 0.1),
}


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_a_pipeline_trains_and_grows_as_one_process_does(case: str) -> None:
    family, layout, dropout = CASES[case]
    ranks = prod(layout.get(axis, 1) for axis in ("pp", "tp", "dp_shard", "dp_replicate"))
    wanted = run_distributed(run, 1, family, {}, dropout)[0]
    results = run_distributed(run, ranks, family, layout, dropout, timeout=240)
    held: set[str] = set()
    for got in results:
        check_same(got, wanted, 1e-9)
        held |= got["weights"].keys()
    assert held - {"output_table"} == wanted["weights"].keys() - {"output_table"}
    # Layers changed their stage, so something was sent.
    assert any(got["received"] for got in results)
    before, after = ([part for got in results for part in got["ranges"][step]] for step in (0, -1))
    assert sorted(before) != sorted(after)
    assert {index for part in after for index in part} == set(range(GROWN["layers"]))


def evaluated(layout: dict[str, Any]) -> tuple[float, tuple[int, ...], float]:
    """Loss, shape and sum of logits of a forward pass without gradients."""
    model = model_of(spec_of("gpt", layers=LAYERS), grid(**layout))
    batch = global_batch(1)
    with torch.no_grad():
        loss = model(batch.tokens, batch.domain, batch.targets).double()
        logits = model(batch.tokens, batch.domain)
        total = logits.double().abs().sum()
    model.grid.sum(loss, "pp")
    model.grid.sum(total, "pp")
    return float(loss), tuple(logits.shape), float(total)


@pytest.mark.distributed
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b", "zbv"])
def test_a_forward_pass_goes_through_all_stages(schedule: str) -> None:
    ((loss, shape, total),) = run_distributed(evaluated, 1, {})
    results = run_distributed(evaluated, 2, {"pp": 2, "schedule": schedule})
    last = 0 if schedule == "zbv" else 1
    for rank, (found, has, sums) in enumerate(results):
        assert (found, sums) == pytest.approx((loss, total), rel=1e-12)
        assert has == (shape if rank == last else (*shape[:2], 0))


def untied() -> tuple[bool, bool]:
    """Whether two copies of a table that have drifted apart are one again, and gradients are summed."""
    model = model_of(spec_of("gpt"), grid(pp=2))
    assert isinstance(model, Pipeline)
    name = "token_table" if dist.get_rank() == 0 else "output_table"
    table = model.get_parameter(name)
    with torch.no_grad():
        table.to_local().fill_(float(dist.get_rank() + 1))
    copy_tied(model, {})
    table.grad = torch.full_like(table, float(dist.get_rank() + 1))
    add_tied_gradients(model)
    return bool((table.to_local() == 1.0).all()), bool((table.grad.to_local() == 3.0).all())


@pytest.mark.distributed
def test_both_copies_of_a_tied_table_stay_one() -> None:
    assert run_distributed(untied, 2) == [(True, True), (True, True)]


def test_stages_are_balanced_by_cost() -> None:
    assert balanced(11, 2, 0.0, 0.0) == (6, 5)
    assert balanced(11, 2, 0.0, 3.0) == (7, 4)
    assert balanced(12, 4, 0.0, 1.5) == (4, 3, 3, 2)
    assert balanced(4, 4, 9.0, 9.0) == (1, 1, 1, 1)
    assert balanced(3, 4, 0.0, 0.0) == (1, 1, 1, 0)
    for stages in (2, 3, 5):
        for head in (0.0, 0.7, 2.5):
            sizes = balanced(13, stages, 0.0, head)
            assert sum(sizes) == 13 and min(sizes) >= 1
            worst = max([*sizes[:-1], sizes[-1] + head])
            # No move of a layer makes the slowest stage faster.
            for source in range(stages):
                for target in range(stages):
                    moved = list(sizes)
                    moved[source] -= 1
                    moved[target] += 1
                    if moved[source] >= 1:
                        assert max([*moved[:-1], moved[-1] + head]) >= worst - 1e-9


def test_every_parameter_has_a_stage() -> None:
    for family, tables in (("gpt", set()), ("llama", {"output_table"})):
        parts = parts_of((2, 1, 2))
        model = model_of(spec_of(family, layers=5), grid())
        stages = {name: stage_of(name, parts) for name in dict(model.named_parameters())}
        assert {stages[f"layers.{index}.attention.qkv_weight"] for index in (0, 1)} == {0}
        assert stages["layers.2.attention.qkv_weight"] == 1
        assert {stage for name, stage in stages.items() if name.split(".")[0] in {"final_norm"} | tables} == {2}
        assert stages["token_table"] == 0
        assert copies_of(model) == {}
        assert [list(part.layers) for part in stage_parts(model.spec, model.grid)] == [[0, 1, 2, 3, 4]]
