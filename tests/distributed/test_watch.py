"""A rank that fails, dies, stops or falls behind: told once, first, by name, and the others end."""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml

from elle_mp.parallel import noticeboard, watch
from tests.stream.program import KILLED_AFTER
from tests.stream.runs import Ended, command, config_of, finish, on_ranks, reference, run, start

pytestmark = pytest.mark.distributed

LIMITS = ("parallel.step_timeout=2", "parallel.first_timeout=60")
"""Between ordinary steps, of which the fifth is the first that anything is done in here."""


def struck(folder: Path, strike: str, *overrides: str) -> tuple[Ended, float]:
    """A run of two ranks that ends badly, and how long it took."""
    config, began = config_of(reference("gpt")), time.monotonic()
    ended = run(config, f"run.dir={folder}", *LIMITS, *overrides, ranks=2, strike=strike)
    return ended, time.monotonic() - began


def spoken(ended: Ended) -> str:
    """The one line that all ranks together have to say."""
    (line,) = ended.err.splitlines()
    assert line.startswith("elle-mp: error: ")
    return line.removeprefix("elle-mp: error: ")


def the_file(folder: Path) -> str:
    """What the ranks wrote of a hang."""
    (path,) = folder.glob("hang-*.txt")
    return path.read_text()


class SlowBoard(noticeboard.Noticeboard):
    """Every look at it takes a while, in the store."""

    def incident(self) -> noticeboard.Incident | None:
        with suppress(dist.DistError):
            self._store.wait(["never"], timedelta(seconds=0.5))
        return super().incident()


def watched(fails: bool) -> None:
    """A rank that ends while its watch is in the store."""
    watch.Noticeboard, watch.GLANCE = SlowBoard, 0.0  # type: ignore[misc]
    dist.init_process_group("gloo")
    with watch.Watch():
        time.sleep(0.2)
        if fails:
            raise ValueError("this is it")


@pytest.mark.parametrize("fails", [False, True])
def test_the_interpreter_ends_with_no_thread_in_the_store(fails: bool) -> None:
    """Where one is, Python < 3.14 aborts."""
    ended = on_ranks(watched, fails, ranks=2)
    assert (ended.code, ended.err.count("Traceback"), "terminate" in ended.err) == (fails, fails, False)


def test_a_fault_is_told_once_with_its_traceback(tmp_path: Path) -> None:
    ended, seconds = struck(tmp_path, "1:fail/this is it@step=5", "parallel.dp_replicate=2")
    assert ended.code == 1
    assert ended.err.startswith("Traceback")
    assert ended.err.count("Traceback") == 1
    assert "elle-mp: error" not in ended.err
    assert ended.err.splitlines()[-1] == "RuntimeError: this is it"
    assert seconds < 20


def test_a_mistake_that_one_rank_sees_is_one_line(tmp_path: Path) -> None:
    ended, _ = struck(tmp_path, "1:mistake/you did it@step=5", "parallel.tp=2")
    assert (ended.code, spoken(ended)) == (2, "you did it")


def test_without_torchrun_the_store_dies_with_rank_0(tmp_path: Path) -> None:
    ended, seconds = struck(tmp_path, "0:SIGKILL@step=5", "parallel.dp_shard=2")
    assert spoken(ended).startswith("rank 0, or what started it, is gone (killed?)")
    assert seconds < 20


def test_a_stopped_rank_is_named(tmp_path: Path) -> None:
    ended, seconds = struck(tmp_path, "1:SIGSTOP@step=5", "parallel.dp_shard=2")
    assert "rank 1 is stopped (SIGSTOP?); rank 0 waits in all_reduce #" in spoken(ended)
    assert seconds < KILLED_AFTER + 5
    told = the_file(tmp_path)
    assert "=== rank 1 is stopped" in told
    assert "=== rank 0, process" in told
    assert "in _train_phase" in told


def test_a_rank_that_falls_behind_is_named_with_its_place(tmp_path: Path) -> None:
    ended, seconds = struck(tmp_path, "1:sleep/60@step=5", "parallel.tp=2")
    assert ended.code == 1
    line = spoken(ended)
    assert "rank 1 never entered all_reduce #" in line
    assert "it is in runner.py:" in line
    assert str(tmp_path) in line
    assert seconds < 20
    told = the_file(tmp_path)
    assert "=== rank 0" in told
    assert "time.sleep(float(seconds))" in told[told.index("=== rank 1") :]


def test_a_stage_of_a_pipeline_that_keeps_the_next_waiting_is_named(tmp_path: Path) -> None:
    """Transfers over gloo are on no record."""
    rare = ("eval.every=0", "checkpoint.every=100")
    ended, seconds = struck(tmp_path, "0:sleep/60@micro=11", "parallel.pp=2", *rare)
    assert "rank 0 is in no collective; it is in pipeline.py:" in spoken(ended)
    assert "_wait_batch_p2p" in the_file(tmp_path).partition("=== rank 1")[2]
    assert seconds < 20


def test_a_replica_that_drifts_ends_the_run_before_it_is_saved(tmp_path: Path) -> None:
    """Four ranks: the two tensor-parallel halves are checked apart, and one of them finds nothing."""
    one, checked = reference("gpt"), ("parallel.tp=2", "parallel.dp_replicate=2", "parallel.check_every=4")
    strike = "2:flip/layers.0.mlp.in_weight@step=5"
    ended = run(config_of(one), f"run.dir={tmp_path}", *checked, ranks=4, strike=strike)
    assert ended.code == 2
    # Before the checkpoint of step 6; the flipped bit has been trained with, but gradients are summed over replicas.
    assert spoken(ended).startswith(
        "after step 6 layers.0.mlp.in_weight is not the same over parallel.dp_replicate: rank 2 differs from rank 0; "
    )
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == "step-00000003-train"


@pytest.mark.parametrize("layout", [("tp=2",), ("dp_replicate=1", "idle_ranks=true", "first_timeout=3")])
def test_no_false_alarm(layout: tuple[str, ...], tmp_path: Path) -> None:
    """What is no step takes longer than a step may; to ranks that it leaves idle, a stage longer than anything may."""
    tree = yaml.safe_load(config_of(reference("gpt")).read_text())
    tree["stream"] = [tree["stream"][0] | {"steps": 5}]
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    overrides = (*LIMITS, *(f"parallel.{item}" for item in layout))
    slow = run(config, f"run.dir={tmp_path / 'run'}", *overrides, ranks=2, strike="0:sleep/4@evaluation=1")
    assert (slow.code, slow.err) == (0, "")


def test_torchrun_says_it_too(tmp_path: Path) -> None:
    where = f"run.dir={tmp_path}"
    arguments = command(str(config_of(reference("gpt"))), where, "parallel.tp=2", ranks=2, strike="0:SIGKILL@step=5")
    ended = finish(start(arguments))
    assert ended.code == 1
    # torchrun sees the death, too, and may log that it signals the other rank before that rank has spoken.
    ours = [line for line in ended.err.splitlines() if "distributed/elastic/" not in line]
    assert ours[0] == "elle-mp: error: rank 0 is gone (killed?)"
    assert ended.err.count("elle-mp: error") == 1
