"""The parts of a pipeline: who holds what, tables on two stages, forward passes (training: test_parity.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from elle_mp.models.pipeline import Pipeline, add_tied_gradients, copy_tied, stage_of, stage_parts
from elle_mp.parallel.pipeline import balanced, parts_of
from elle_mp.parallel.sharding import copies_of
from tests.distributed.training import global_batch
from tests.distributed_utils import run_distributed
from tests.tiny import grid, model_of, spec_of

LAYERS = 5


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
