"""``profile step``: every moment of a real step belongs to one part, with and without other ranks."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from elle_mp.cli import main as program
from elle_mp.profiling.attribution import Event, attribute
from elle_mp.profiling.ranges import ranges
from elle_mp.profiling.results import STEP
from elle_mp.profiling.step import profile_step
from elle_mp.train.optimizer import ShardedAdamW
from tests import tiny
from tests.distributed_utils import run_distributed
from tests.stream.runs import write_stream

PARTS = {"attention", "mlp", "norm", "loss"}
NODE = "autograd::engine::evaluate_function: MmBackward0"


def test_every_moment_belongs_to_the_innermost_part() -> None:
    events = [
        Event("elle_mp/step", 0, 100, 1),
        Event("elle_mp/attention", 10, 30, 1),
        Event("aten::mm", 12, 20, 1, sequence=5),
        Event("elle_mp/norm", 20, 25, 1),
        Event("elle_mp/collectives", 26, 28, 1),
        Event(NODE, 40, 60, 1, sequence=5),
        Event("aten::mm", 45, 50, 1),
        Event("elle_mp/mlp", 50, 55, 1),  # computed once more
        Event("c10d::allreduce_", 60, 65, 1),
        Event(NODE, 70, 75, 1, sequence=99),
        Event("gloo:all_reduce", 24, 28, 7, in_flight=True),
        Event("gloo:all_reduce", 26, 64, 7, in_flight=True),
        Event("aten::mm", 0, 100, 2),  # of another thread
        Event("aten::mm", 200, 300, 1),  # of no step
    ]
    found = attribute(events)
    assert found.parts == {
        ("rest", "forward"): 10 + 10 + 5 + 25,
        ("attention", "forward"): 10 + 1 + 2,
        ("norm", "forward"): 5,
        ("collectives", "forward"): 2 + 5,
        ("attention", "backward"): 15,
        ("mlp", "backward"): 5,
        ("rest", "backward"): 5,
    }
    assert found.total == 100 == sum(found.parts.values())
    assert found.in_flight == 40
    assert found.hidden == 40 - 2 - 4
    with pytest.raises(ValueError, match="no step"):
        attribute(events[1:])


def test_the_parts_of_a_real_step_are_its_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, trace, page = tmp_path / "a.json", tmp_path / "t.json.gz", tmp_path / "a.html"
    config = write_stream(tmp_path / "stream")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        files = ["--json", str(out), "--trace", str(trace), "--html", str(page)]
        assert exit_code(["profile", "step", str(config), "--steps", "2", "--stage", "1", *files]) == 0
    finally:
        torch.set_num_threads(threads)
    results = json.loads(out.read_text())
    assert results["kind"] == STEP
    check_parts(results, PARTS | {"embedding", "optimizer"})
    assert results["overlap"] is None
    assert "One training step" in capsys.readouterr().out
    assert "attention" in page.read_text()
    names = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert names >= {"elle_mp/step", "elle_mp/attention", "elle_mp/loss"}
    assert not (tmp_path / "stream" / "run").exists()


def test_two_ranks_wait_for_each_other(tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    config = write_stream(tmp_path / "stream")
    run_distributed(profile_two, 2, config, out)
    results = json.loads(out.read_text())
    assert results["machine"]["ranks"] == 2
    check_parts(results, PARTS | {"collectives"})
    assert 0 <= results["overlap"] <= 1
    shares = {(row["part"], row["pass"]): row["share"] for row in results["rows"]}
    assert shares["collectives", "forward"] > 0 and shares["collectives", "backward"] > 0


def profile_two(config: Path, out: Path) -> None:
    torch.set_num_threads(1)
    profile_step(config, ["parallel.tp=2"], 0, 2, None, out, None)


def check_parts(results: dict[str, Any], parts: set[str]) -> None:
    """Whether the parts are there and make up the step as a clock outside of the profiler saw it."""
    rows = results["rows"]
    assert {row["part"] for row in rows} >= parts
    assert {row["part"] for row in rows if row["pass"] == "backward"} >= {"attention", "mlp", "norm"}
    assert sum(row["share"] for row in rows) == pytest.approx(1, abs=1e-6)
    assert sum(row["seconds"] for row in rows) == pytest.approx(results["profiled_seconds"], rel=0.05)


def test_nothing_is_left_on_the_model() -> None:
    place = tiny.grid()
    try:
        model = tiny.model_of(tiny.spec_of("gpt"), place, torch.float32)
        optimizer = ShardedAdamW(model, tiny.OptimConfig())
        before = [set(vars(module)) for module in model.modules()]
        wait = dist.Work.wait
        with ranges(model, optimizer):
            assert [set(vars(module)) for module in model.modules()] != before
            assert dist.Work.wait is not wait
        assert [set(vars(module)) for module in model.modules()] == before
        assert dist.Work.wait is wait
        assert "step" not in vars(optimizer)
    finally:
        dist.destroy_process_group()


def test_a_stage_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["profile", "step", str(write_stream(tmp_path)), "--stage", "7"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and "stages 0 to 2" in err


def exit_code(arguments: list[str]) -> int | str | None:
    with pytest.raises(SystemExit) as end:
        program.main(arguments)
    return end.value.code
