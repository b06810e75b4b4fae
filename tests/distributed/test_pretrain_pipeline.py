"""A whole stream through a pipeline, and one whose layout grows with the model: torchrun against one process."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from elle_mp.checkpoint.store import CheckpointStore
from tests.distributed.test_pretrain_layouts import check_same
from tests.stream.runs import command, config_of, finish, lines, reference, results, start, succeed

pytestmark = pytest.mark.distributed


def test_a_pipeline_measures_what_one_process_does(tmp_path: Path) -> None:
    """Two, three and four layers over two stages; every growth moves layers."""
    one, two = reference("gpt"), tmp_path / "run"
    succeed(config_of(one), f"run.dir={two}", "parallel.pp=2", ranks=2)
    check_same(one, two, 1e-9, 1e-10)


def test_a_pipeline_keeps_its_measured_split_and_measures_again_under_another_layout(tmp_path: Path) -> None:
    one, run_dir = reference("bert"), tmp_path / "run"
    given = (f"run.dir={run_dir}", "parallel.pp=2", "parallel.split=measured")
    stopped = succeed(config_of(one), *given, ranks=2, strike="all:SIGINT@step=15")
    assert "stopped in stage 1 (b, train) after step 2;" in stopped.out
    assert re.findall(r"split for (\w): (\d) \+ (\d) layers", stopped.out) in splits_of("a", "b")
    first = saved(run_dir)["split"]
    goes_on = succeed(config_of(one), *given, ranks=2, strike="all:SIGINT@step=3")
    assert "split for" not in goes_on.out
    assert saved(run_dir)["split"] == first
    ended = succeed(config_of(one), *given, "parallel.recompute=full", ranks=2)
    assert re.findall(r"split for (\w): (\d) \+ (\d) layers", ended.out) in splits_of("b", "c")
    a, b, c = (stage["split"] for stage in results(run_dir)["stages"])
    assert a["layout"] == first["layout"] != b["layout"] == c["layout"]
    assert b["seconds"] != first["seconds"]
    assert [sum(split["layers"]) for split in (a, b, c)] == [2, 3, 4]
    check_same(one, run_dir, 1e-9, 1e-10)


def saved(run_dir: Path) -> dict[str, Any]:
    """Where the last checkpoint stands."""
    store = CheckpointStore(run_dir / "checkpoints")
    name = store.latest()
    assert name is not None
    state: dict[str, Any] = store.meta(name)["state"]
    return state


def splits_of(*domains: str) -> list[list[tuple[str, ...]]]:
    """All splits of two stages over two ranks that a clock may find."""
    choices = {"a": ["11"], "b": ["12", "21"], "c": ["13", "22", "31"]}
    return [list(found) for found in product(*([(name, *split) for split in choices[name]] for name in domains))]


def growing_layout(folder: Path) -> Path:
    """The stream of gpt: one rank, two, and all four, tensor parallel in a pipeline."""
    tree = yaml.safe_load(config_of(reference("gpt")).read_text())
    tree["parallel"] = {"dp_replicate": 1, "idle_ranks": True}
    tree["stream"][1]["parallel"] = {"tp": 2}
    tree["stream"][2]["parallel"] = {"tp": 2, "pp": 2, "schedule": "interleaved_1f1b", "split": "measured"}
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    return config


def test_the_layout_grows_with_the_model_and_ranks_wait_for_their_turn(tmp_path: Path) -> None:
    one, four = reference("gpt"), tmp_path / "run"
    config = growing_layout(tmp_path)
    ended = finish(start(command(str(config), f"run.dir={four}", ranks=4)))
    assert ended.code == 0, ended.err
    check_same(one, four, 1e-9, 1e-10)
    # Also when the job is cut in a stage in which ranks wait.
    again = tmp_path / "again"
    stopped = succeed(config, f"run.dir={again}", ranks=4, strike="all:SIGTERM@step=10")
    assert "stopped in stage 1 (b, recover) after step 2;" in stopped.out
    assert len(lines(again, "metrics")) == 10
    succeed(config, f"run.dir={again}", ranks=4)
    check_same(one, again, 1e-9, 1e-10)


def test_ranks_without_a_place_are_an_error_unless_asked_for(tmp_path: Path) -> None:
    one = reference("gpt")
    wrong = finish(
        start(command(str(config_of(one)), f"run.dir={tmp_path / 'run'}", "parallel.dp_replicate=1", ranks=2))
    )
    assert wrong.code != 0
    assert "= 1 ranks, but 2 run; start 1, or set dp_replicate=auto, or idle_ranks=true" in wrong.err
