"""A whole stream through a pipeline, and one whose layout grows with the model: torchrun against one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.distributed.test_pretrain_layouts import check_same
from tests.stream.runs import command, config_of, finish, lines, reference, start, succeed

pytestmark = pytest.mark.distributed


def test_a_pipeline_measures_what_one_process_does(tmp_path: Path) -> None:
    """Two, three and four layers over two stages; every growth moves layers."""
    one, two = reference("gpt"), tmp_path / "run"
    succeed(config_of(one), f"run.dir={two}", "parallel.pp=2", ranks=2)
    check_same(one, two, 1e-9, 1e-10)


def test_a_pipeline_goes_on_under_another_layout(tmp_path: Path) -> None:
    one = reference("bert")
    folder = f"run.dir={tmp_path / 'run'}"
    stopped = succeed(config_of(one), folder, "parallel.pp=2", ranks=2, strike="all:SIGINT@step=16")
    assert "stopped in stage 1 (b, train) after step 3;" in stopped.out
    succeed(config_of(one), folder)
    check_same(one, tmp_path / "run", 1e-9, 1e-10)


def growing_layout(folder: Path) -> Path:
    """The stream of gpt: one rank, two, and all four, tensor parallel in a pipeline."""
    tree = yaml.safe_load(config_of(reference("gpt")).read_text())
    tree["parallel"] = {"dp_replicate": 1, "idle_ranks": True}
    tree["stream"][1]["parallel"] = {"tp": 2}
    tree["stream"][2]["parallel"] = {"tp": 2, "pp": 2, "schedule": "interleaved_1f1b"}
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
