"""What a growth leaves to the steps behind it, in whole streams: rates, rest of the old entries, what is recorded."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from elle_mp.checkpoint.store import CheckpointStore
from elle_mp.checkpoint.stream_reader import StoredTensors
from elle_mp.growth.factors import Factors
from elle_mp.growth.plan import GrowthPlan
from elle_mp.growth.rates import factors_of
from elle_mp.models.declarations import declarations
from elle_mp.train.rates import rewarm_factor
from tests.stream.runs import (
    COMMUNICATION,
    TIMINGS,
    Ended,
    differences,
    lines,
    record,
    results,
    run,
    succeed,
    write_stream,
)
from tests.tiny import grid

STREAM: list[dict[str, Any]] = [
    {"domain": "a", "data": "a.jsonl", "steps": 3},
    {"domain": "b", "data": "b.jsonl", "steps": 3, "recover": {"steps": 2}, "grow": {"layers": 3, "heads": 3}},
    {"domain": "c", "data": "c.jsonl", "steps": 4, "grow": {"heads": 4, "mlp": 150}},
]
GROWN_AT = (3, 8)
STEPS = 12
REWARM = 4
RATES = ("keep", "mup", "rewarm", "asym_rewarm")


def stream(folder: Path, family: str = "gpt", **growth: Any) -> Path:
    """A configuration with three short stages, two growths, and a constant rate, so that every factor shows."""
    return write_stream(
        folder,
        family,
        stream=STREAM,
        growth=growth,
        optim={"lr": 3e-3, "warmup": 0, "schedule": "constant"},
        checkpoint={"every": 3, "keep": 20},
        eval={"every": 0, "batches": 2},
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An uninterrupted run for every strategy of the rate."""
    configs = {rate: stream(tmp_path_factory.mktemp(rate), rate=rate, rewarm_steps=REWARM) for rate in RATES}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(succeed, configs.values()))
    return {rate: config.with_name("run") for rate, config in configs.items()}


def column(run_dir: Path, key: str) -> list[float]:
    """A number of every step."""
    return [line[key] for line in lines(run_dir, "metrics")]


def since(step: int) -> int | None:
    """Steps done after the last growth when the one numbered ``step`` (from 0) begins."""
    return min((step - at for at in GROWN_AT if step >= at), default=None)


@pytest.mark.parametrize("rate", RATES)
def test_the_record_says_how_training_goes_on(rate: str, finished: dict[str, Path]) -> None:
    stages = results(finished[rate])["stages"]
    assert stages[0]["growth"] is None
    for stage in stages[1:]:
        growth = stage["growth"]
        assert (growth["rate"], growth["moments"], growth["recut"]) == (rate, "scaled", [])
        assert growth["exact"] and growth["reason"] is None and growth["max_logit_diff_rel"] < 1e-10
        assert growth["to"]["params"] > growth["from"]["params"]


def test_rates_that_rise_again_are_those_of_the_rule(finished: dict[str, Path]) -> None:
    for rate in RATES:
        wanted = [3e-3 * rewarm_factor(rate, since(step), REWARM) for step in range(STEPS)]
        assert column(finished[rate], "lr") == pytest.approx(wanted, rel=1e-12)
    assert column(finished["rewarm"], "lr")[7:11] == pytest.approx([3e-3, 0.75e-3, 1.5e-3, 2.25e-3], rel=1e-12)


def test_every_strategy_is_the_same_until_the_growth_and_another_after_it(finished: dict[str, Path]) -> None:
    losses = {rate: column(run_dir, "loss") for rate, run_dir in finished.items()}
    for rate in RATES[1:]:
        # The step right after growth starts from the same model.
        assert losses[rate][: GROWN_AT[0] + 1] == losses["keep"][: GROWN_AT[0] + 1], rate
        assert all(a != b for a, b in zip(losses[rate][5:], losses["keep"][5:], strict=True)), rate


@pytest.mark.parametrize("rate", ["mup", "asym_rewarm"])
def test_killed_behind_a_growth_it_ends_the_same(rate: str, finished: dict[str, Path], tmp_path: Path) -> None:
    """Behind the first growth's recovery, and behind the second: the factors of both come from the checkpoints."""
    whole, folder = finished[rate], tmp_path / "run"
    for place, done in (("step=7", 6), ("step=7", 11)):
        # A save in the background may not be complete yet when the kill comes.
        now = "checkpoint.background=false"
        ended = run(whole.with_name("config.yaml"), f"run.dir={folder}", now, strike=f"all:SIGKILL@{place}")
        assert ended.code == -signal.SIGKILL, ended.err
        assert len(lines(folder, "metrics")) == done
    ended = succeed(whole.with_name("config.yaml"), f"run.dir={folder}")
    assert "going on from checkpoint step-00000011-train" in ended.out
    assert record(folder) == record(whole)


@pytest.mark.distributed
def test_two_ranks_that_share_the_parameters_are_the_same_run(finished: dict[str, Path], tmp_path: Path) -> None:
    """Rates by entry are cut with the shards."""
    left_out = (*TIMINGS, COMMUNICATION, "recut", "max_logit_diff", "max_logit_diff_rel")
    folder = tmp_path / "run"
    succeed(finished["mup"].with_name("config.yaml"), f"run.dir={folder}", "parallel.dp_shard=2", ranks=2)
    assert differences(record(folder, left_out), record(finished["mup"], left_out), 1e-7) == []


def stored(run_dir: Path, name: str) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole."""
    tensors = StoredTensors(run_dir / "checkpoints" / name)
    return {key: tensors.read(key, tuple((0, size) for size in shape)) for key, (shape, _) in tensors.tensors.items()}


def old_entries(factors: Mapping[str, Factors], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Where each parameter's entries were there before the growth."""
    masks = {}
    for name, found in factors.items():
        mask = torch.full(weights[f"model.{name}"].shape, not found.new)
        for dim, item in enumerate(found.old):
            if item is not None:
                mask &= item.view([-1 if index == dim else 1 for index in range(mask.dim())])
        masks[name] = mask
    return masks


FROZEN = 4
"""Steps of rest: both of the recovery, and two of the stage."""


@pytest.mark.parametrize("family", ["gpt", "bert"])
def test_old_entries_rest_for_the_steps_asked_for_and_across_a_kill(family: str, tmp_path: Path) -> None:
    """Weights and moments of what was there stay bit for bit, of what was added they move; then all move."""
    grow = {"layers": 3, "heads": 3, "mlp": 99}
    stages = [STREAM[0], STREAM[1] | {"grow": grow}]
    config = stream(tmp_path, family, freeze_old=FROZEN)
    overrides = (f"stream={stages}", "checkpoint.every=1")
    ended = run(config, *overrides, strike="all:SIGKILL@step=6")  # two steps of rest are done
    assert ended.code == -signal.SIGKILL, ended.err
    assert "going on from checkpoint step-00000005-train" in succeed(config, *overrides).out
    run_dir = tmp_path / "run"
    names = ("step-00000004-recover", "step-00000006-train", "step-00000007-train", "stage-1-b")
    first, still, last_rest, moved = (stored(run_dir, checkpoint) for checkpoint in names)
    grid()
    meta = CheckpointStore(run_dir / "checkpoints").meta("stage-1-b")
    lineage = [GrowthPlan.from_json(plan) for plan in meta["state"]["lineage"]]
    masks = old_entries(factors_of(lineage, declarations), first)
    assert sum(int(mask.sum()) for mask in masks.values()) == results(run_dir)["stages"][0]["params"]
    learned = 0
    for name, mask in masks.items():
        for key in (f"model.{name}", f"optim.{name}.exp_avg", f"optim.{name}.exp_avg_sq"):
            for later in (still, last_rest):
                assert torch.equal(first[key][mask], later[key][mask]), key
            learned += int((first[key][~mask] != last_rest[key][~mask]).sum())
        assert not bool(mask.any()) or not torch.equal(last_rest[f"model.{name}"][mask], moved[f"model.{name}"][mask])
    assert learned > sum(int((~mask).sum()) for mask in masks.values())


MISTAKES = {
    "growth.width=wieghted": "growth.width=wieghted: there is no such strategy; did you mean weighted?",
    "growth.depth=zeroout": "growth.depth=zeroout: there is no such strategy; did you mean zero_out?",
    "growth.depth=gate": "growth.depth=gate: gpt is pre-norm and needs no gate; zero_out is exact there",
    "growth.rate=mu": "growth.rate",
    "growth.moments=scale": "growth.moments",
    "growth.freeze_old=-1": "growth.freeze_old",
    "growth.rewarm_steps=0": "growth.rewarm_steps",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_in_the_growth_is_one_line_before_anything_starts(
    override: str, finished: dict[str, Path], tmp_path: Path
) -> None:
    ended = run(finished["keep"].with_name("config.yaml"), f"run.dir={tmp_path / 'run'}", override)
    assert ended.code == 2
    assert ended.err.count("\n") == 1 and ended.err.startswith("elle-mp: error: ")
    assert MISTAKES[override] in ended.err
    assert not (tmp_path / "run").exists()


INEXACT = (("aki", "stack"), ("sparkling", "interleave"))


@pytest.mark.parametrize(("width", "depth"), INEXACT)
def test_what_is_not_exact_runs_by_its_name_and_says_so(width: str, depth: str, tmp_path: Path) -> None:
    ended: Ended = succeed(stream(tmp_path), f"growth.width={width}", f"growth.depth={depth}")
    for domain in ("b", "c"):
        assert f"{domain}: not exact: growth.width {width}" in ended.out
    growth = results(tmp_path / "run")["stages"][1]["growth"]
    assert (growth["width"], growth["depth"], growth["exact"], growth["moments"]) == (width, depth, False, "reset")
    assert growth["max_logit_diff_rel"] > 1e-3
    assert all(part in growth["reason"] for part in (f"growth.width {width}", f"growth.depth {depth}"))
    assert growth["ppl_after"]["a"] != pytest.approx(growth["ppl_before"]["a"], rel=1e-6)
    assert growth["rate"] == ("asym_rewarm" if width == "sparkling" else "keep")
