"""Killed, interrupted, started again: the run ends where the uninterrupted one ends, to the last digit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml

from elle_mp.checkpoint.store import CheckpointStore
from elle_mp.checkpoint.stream_reader import StoredTensors
from tests.stream.runs import (
    call,
    command,
    config_of,
    finish,
    lines,
    record,
    reference,
    results,
    run,
    start,
    succeed,
    write_jsonl,
    write_stream,
)

KILLED = -signal.SIGKILL
KILLS = (
    # (where, finished steps in metrics.jsonl, finished stages in results.json)
    ("step=6", 5, 0),  # in the middle of a stage, after an evaluation and a checkpoint
    ("grew=1", 8, 1),  # between growth and the first step, as soon as it is told
    ("step=1", 8, 1),  # the same, in the first step
    ("step=5", 12, 1),  # in a recovery
    ("results=1", 21, 1),  # between a stage's checkpoint and its results
    ("evaluation=3", 32, 2),  # in the last evaluation
    ("results=1", 32, 2),  # between the last checkpoint and the last results
)


def test_killed_anywhere_it_ends_the_same(tmp_path: Path) -> None:
    """In bf16: what is saved must be the masters, not what the computation sees of them."""
    whole = reference("gpt", precision="bf16")
    config, folder = config_of(whole), tmp_path / "run"
    for place, steps, stages in KILLS:
        ended = run(config, f"run.dir={folder}", strike=f"all:SIGKILL@{place}")
        assert ended.code == KILLED, (place, ended.err)
        assert len(lines(folder, "metrics")) == steps, place
        finished = len(results(folder)["stages"]) if (folder / "results.json").exists() else 0
        assert finished == stages, place
    succeed(config, f"run.dir={folder}")
    assert record(folder) == record(whole)
    left = [path.name for path in folder.rglob("*") if ".tmp-" in path.name or ".writing-" in path.name]
    assert left == []


def test_what_growth_leaves_to_the_optimizer_survives_kills(tmp_path: Path) -> None:
    """Rates and epsilons of each entry, what is old, and since when: all follow from the lineage in the checkpoint."""
    growth = {"rate": "mup", "freeze_old": 4, "width": "weighted"}
    config = write_stream(tmp_path, "gpt", growth=growth, checkpoint={"every": 2, "background": False})
    whole, folder = tmp_path / "run", tmp_path / "killed"
    succeed(config)
    for place in ("grew=1", "step=4", "grew=1"):  # before, and after the first save that is grown
        ended = run(config, f"run.dir={folder}", strike=f"all:SIGKILL@{place}")
        assert ended.code == KILLED, (place, ended.err)
        if place == "step=4":
            state = CheckpointStore(folder / "checkpoints").meta("step-00000010-recover")["state"]
            assert (state["growth_step"], len(state["lineage"]), state["lineage"][0]["rate"]) == (8, 1, "mup")
    succeed(config, f"run.dir={folder}")
    assert record(folder) == record(whole)
    stored = [StoredTensors(at / "checkpoints" / "stage-2-c") for at in (whole, folder)]
    states = [item.meta["state"] for item in stored]
    assert states[0]["lineage"] == states[1]["lineage"] and [state["growth_step"] for state in states] == [21, 21]
    for name, (shape, _) in stored[0].tensors.items():
        bounds = tuple((0, size) for size in shape)
        assert torch.equal(*(item.read(name, bounds) for item in stored)), name


def test_a_run_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    """Its configuration and its checkpoints lack what is new; the defaults are what it did without."""
    config, folder = config_of(reference("gpt")), tmp_path / "run"
    succeed(config, f"run.dir={folder}", strike="all:SIGTERM@step=15")
    saved = folder / "config.yaml"
    header, tree = saved.read_text().split("\n", 1)[0], yaml.safe_load(saved.read_text())
    for section, keys in (("growth", ("rate", "rewarm_steps", "freeze_old", "anneal")), ("model", ("width", "vocab"))):
        for key in keys:
            del tree[section][key]
    for stage in tree["stream"][1:]:
        for key in ("head_dim", "width", "seq_len", "vocab"):
            del stage["grow"][key]
    saved.write_text(f"{header}\n{yaml.safe_dump(tree, sort_keys=False)}")
    for meta in folder.glob("checkpoints/*/meta.json"):
        content = json.loads(meta.read_text())
        for part, keys in (("state", ("lineage", "growth_step")), ("model", ("rope_exponents", "live_vocab"))):
            for key in keys:
                del content["meta"][part][key]
        meta.write_text(json.dumps(content))
    ended = run(config, f"run.dir={folder}", "growth.rate=mup")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "growth.rate=auto, not mup" in ended.err
    text = f"a={reference('gpt').parent / 'a.jsonl'}"
    assert call("evaluate", str(folder), "--data", text).code == 0
    succeed(config, f"run.dir={folder}")
    assert record(folder) == record(reference("gpt"))


def test_killed_from_outside_it_ends_the_same(tmp_path: Path) -> None:
    """The kills fall where they fall, as those of a machine do."""
    whole = reference("gpt")
    config, folder = config_of(whole), tmp_path / "run"
    metrics = folder / "metrics.jsonl"
    for steps in (2, 10):
        with start(command(str(config), f"run.dir={folder}")) as process:
            wait_for(process, lambda steps=steps: metrics.is_file() and metrics.read_bytes().count(b"\n") >= steps)
            process.kill()
    succeed(config, f"run.dir={folder}")
    assert record(folder) == record(whole)


@pytest.fixture(scope="module")
def stopped_thrice(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run that SIGTERM, SIGINT, and SIGTERM in the last step of a phase stopped, then ended; what it printed."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    config = config_of(reference("llama"))
    said = []
    for strike in ("SIGTERM@step=5", "SIGINT@step=7", "SIGTERM@step=2"):
        ended = succeed(config, f"run.dir={folder}", strike=f"all:{strike}")
        assert ended.err == ""
        said.append(ended.out)
    said.append(succeed(config, f"run.dir={folder}").out)
    return folder, said


def test_a_signal_stops_at_a_step_and_says_where(stopped_thrice: tuple[Path, list[str]]) -> None:
    _, said = stopped_thrice
    again = "run the same command again to go on"
    assert f"stopped in stage 0 (a, train) after step 5; {again}" in said[0]
    # Three more steps end the stage; then four of the recovery.
    assert f"stopped in stage 1 (b, recover) after step 4; {again}" in said[1]
    # In the second step: the first one ended the recovery, and the signal came before the next phase's first.
    assert f"stopped in stage 1 (b, train) after step 1; {again}" in said[2]
    for earlier, text in zip(
        ("step-00000005-train", "step-00000012-recover", "step-00000014-train"), said[1:], strict=True
    ):
        assert f"going on from checkpoint {earlier}" in text


def test_stopped_and_started_again_it_ends_the_same(stopped_thrice: tuple[Path, list[str]]) -> None:
    assert record(stopped_thrice[0]) == record(reference("llama"))


def test_a_signal_in_the_last_step_of_a_stage_leaves_the_next_for_later(tmp_path: Path) -> None:
    config = config_of(reference("gpt"))
    ended = succeed(config, f"run.dir={tmp_path / 'run'}", strike="all:SIGTERM@step=8")
    assert "stopped in stage 1 (b, begin) after step 0;" in ended.out
    assert "grew" not in ended.out
    assert len(results(tmp_path / "run")["stages"]) == 1


def test_ctrl_c_twice_ends_at_once(tmp_path: Path) -> None:
    config = config_of(reference("gpt"))
    ended = run(config, f"run.dir={tmp_path / 'run'}", strike="all:SIGINT+SIGINT@step=5")
    assert ended.code == 130
    assert ended.err.count("\n") == 2
    assert "interrupted twice" in ended.err
    assert len(lines(tmp_path / "run", "metrics")) == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_text_is_prepared_leaves_no_half_file(number: signal.Signals, tmp_path: Path) -> None:
    """The second domain is long, so the signal comes while it is tokenised; then the command goes on."""
    config = write_stream(tmp_path)
    text = " ".join(f"{index} {index * 7919 % 10007}" for index in range(3000))
    write_jsonl(tmp_path / "b.jsonl", (f"{index} {text}" for index in range(400)))
    cache = tmp_path / "run" / "data"
    with start(command(str(config))) as process:
        wait_for(process, lambda: len(list(cache.glob(".*writing*/*"))) > 0)
        time.sleep(0.2)
        os.kill(process.pid, number)
        ended = finish(process)
    assert ended.code == 128 + number
    assert "Traceback" not in ended.err
    assert [path.name for path in (tmp_path / "run").rglob("*") if "writing" in path.name] == []
    assert len(list(cache.glob("*/manifest.json"))) <= 1
    config = write_stream(tmp_path)
    succeed(config, strike="all:SIGTERM@step=1")


def wait_for(process: subprocess.Popen[str], condition: object, timeout: float = 60) -> None:
    """Returns as soon as ``condition()`` holds while the process runs."""
    assert callable(condition)
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)
