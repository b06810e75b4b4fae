"""A whole stream, growth and all, measures the same under every layout: torchrun against one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.stream.runs import (
    COMMUNICATION,
    TIMINGS,
    command,
    config_of,
    differences,
    finish,
    lines,
    record,
    reference,
    start,
    succeed,
)

pytestmark = pytest.mark.distributed

ROUNDING = ("max_logit_diff", "max_logit_diff_rel")
"""Differences of two equal things: rounding itself, checked on its own."""
LEFT_OUT = (*TIMINGS, COMMUNICATION, "recut", "split", *ROUNDING)


def check_same(one: Path, other: Path, tolerance: float, logits: float) -> None:
    assert differences(record(one, LEFT_OUT), record(other, LEFT_OUT), tolerance) == []
    for stage in record(other)["results"]["stages"][1:]:
        assert stage["growth"]["exact"]
        assert stage["growth"]["max_logit_diff_rel"] < logits


STREAMS = {
    "gpt-dp_shard": ("gpt", {"dp_shard": 2}),
    "gpt-dp_replicate": ("gpt", {"dp_replicate": 2}),
    "bert-dp_shard": ("bert", {"dp_shard": 2}),
    "bert-tp": ("bert", {"tp": 2}),
    "llama-tp": ("llama", {"tp": 2}),
}


def changing_layout(folder: Path) -> Path:
    """The stream of gpt, each stage under a layout of its own."""
    tree = yaml.safe_load(config_of(reference("gpt")).read_text())
    tree["parallel"] = {"dp_shard": 2}
    tree["stream"][1]["parallel"] = {"tp": 2, "dp_shard": 1}
    tree["stream"][2]["parallel"] = {"dp_shard": 1, "dp_replicate": 2}
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    return config


@pytest.mark.parametrize("name", STREAMS)
def test_two_ranks_measure_what_one_process_does(name: str, tmp_path: Path) -> None:
    family, layout = STREAMS[name]
    one, two = reference(family), tmp_path / "run"
    overrides = [f"parallel.{axis}={size}" for axis, size in layout.items()]
    succeed(config_of(one), f"run.dir={two}", *overrides, ranks=2)
    check_same(one, two, 1e-9, 1e-10)


def test_fp32_is_the_same_to_its_rounding(tmp_path: Path) -> None:
    one, two = reference("gpt", precision="fp32"), tmp_path / "run"
    succeed(config_of(one), f"run.dir={two}", "parallel.tp=2", ranks=2)
    losses = [[line["loss"] for line in lines(run_dir, "metrics")] for run_dir in (one, two)]
    assert len(losses[0]) == 32
    assert differences(*losses, 1e-4) == []
    check_same(one, two, 2e-3, 1e-4)


def test_a_stage_may_change_the_layout(tmp_path: Path) -> None:
    succeed(changing_layout(tmp_path), f"run.dir={tmp_path / 'run'}", ranks=2)
    check_same(reference("gpt"), tmp_path / "run", 1e-9, 1e-10)


def test_torchrun_runs_it(tmp_path: Path) -> None:
    one = reference("gpt")
    ended = finish(start(command(str(config_of(one)), f"run.dir={tmp_path / 'run'}", "parallel.tp=2", ranks=2)))
    assert ended.code == 0, ended.err
    check_same(one, tmp_path / "run", 1e-9, 1e-10)
    assert "Growth" in ended.out
    assert ended.err == ""


def test_a_signal_to_one_rank_stops_all_and_another_layout_goes_on(tmp_path: Path) -> None:
    one = reference("gpt")
    folder = f"run.dir={tmp_path / 'run'}"
    config = config_of(one)
    struck = command(str(config), folder, "parallel.tp=2", ranks=2, strike="1:SIGTERM@step=10")
    stopped = finish(start(struck))
    assert stopped.code == 0
    assert "stopped in stage 1 (b, recover) after step 2;" in stopped.out
    assert stopped.err == ""
    assert len(lines(tmp_path / "run", "metrics")) == 10
    succeed(config, folder)
    check_same(one, tmp_path / "run", 1e-9, 1e-10)


def test_what_one_process_began_two_ranks_end(tmp_path: Path) -> None:
    one = reference("gpt")
    folder = f"run.dir={tmp_path / 'run'}"
    stopped = succeed(config_of(one), folder, strike="all:SIGINT@step=16")
    assert "stopped in stage 1 (b, train) after step 3;" in stopped.out
    succeed(config_of(one), folder, "parallel.dp_shard=2", ranks=2)
    check_same(one, tmp_path / "run", 1e-9, 1e-10)


def test_a_mistake_is_told_first_and_once(tmp_path: Path) -> None:
    one = reference("gpt")
    wrong = finish(start(command(str(config_of(one)), f"run.dir={tmp_path / 'run'}", "parallel.tp=3", ranks=2)))
    assert wrong.code != 0
    spoken = [line for line in wrong.err.splitlines() if line.startswith("elle-mp: error: ")]
    assert wrong.err.splitlines()[0] == spoken[0]
    assert len(spoken) == 1
    assert "tp=3" in spoken[0]
    assert 'File "' not in wrong.err.split("ChildFailedError")[0].split("torch/distributed")[0]
    assert not (tmp_path / "run").exists()
