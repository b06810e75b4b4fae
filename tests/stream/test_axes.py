"""Streams that grow along other axes: longer context, wider than their heads, more ids, norms on their way back."""

from __future__ import annotations

import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from elle_mp.checkpoint.store import CheckpointStore
from tests.stream.runs import COMMUNICATION, TIMINGS, differences, lines, record, results, run, succeed, write_stream

STREAM: list[dict[str, Any]] = [
    {"domain": "a", "data": "a.jsonl", "steps": 5},
    {
        "domain": "b", "data": "b.jsonl", "steps": 4, "recover": {"steps": 3},
        "grow": {"seq_len": 48, "width": 24, "head_dim": 12, "vocab": 400},
    },
    {"domain": "c", "data": "c.jsonl", "steps": 5},
]  # fmt: skip
ANNEAL = 9  # The recovery's 3 steps, 4 of the stage, and 2 of the next one.
FAMILIES = ("gpt", "bert", "llama")


@pytest.fixture(scope="module", params=FAMILIES)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of an uninterrupted run; its configuration lies beside it."""
    family = request.param
    growth = {"anneal": ANNEAL, "width": "iso" if family == "llama" else "weighted"}
    config = write_stream(tmp_path_factory.mktemp(family), family, stream=STREAM, growth=growth)
    succeed(config)
    return config.with_name("run")


def stored_model(run_dir: Path, checkpoint: str) -> dict[str, Any]:
    """The description of the model in a checkpoint."""
    model: dict[str, Any] = CheckpointStore(run_dir / "checkpoints").meta(checkpoint)["model"]
    return model


def test_growth_is_exact_and_compared_on_text_of_the_old_length(whole: Path) -> None:
    stages = results(whole)["stages"]
    growth = stages[1]["growth"]
    assert growth["exact"] and growth["max_logit_diff_rel"] < 1e-10
    assert growth["ppl_after"]["a"] == pytest.approx(growth["ppl_before"]["a"], rel=1e-9)
    # Nothing was trained between the end of the first stage and the growth, and the text is the same.
    assert growth["ppl_before"]["a"] == pytest.approx(stages[0]["ppl"]["a"], rel=1e-12)
    sizes = ("positions", "embed", "head_dim", "heads")
    assert [tuple(stage[key] for key in sizes) for stage in stages] == [
        (32, 16, 8, 2),
        (48, 24, 12, 2),
        (48, 24, 12, 2),
    ]
    assert [stage["tokens"] for stage in stages] == [5 * 8 * 31, 7 * 8 * 47, 5 * 8 * 47]
    steps = [0, *(line["tokens"] for line in lines(whole, "metrics"))]
    assert [after - before for before, after in pairwise(steps)] == [8 * 31] * 5 + [8 * 47] * 12


def test_norms_end_plain_and_reserved_ids_stay_masked(whole: Path) -> None:
    grown, last = stored_model(whole, "stage-1-b"), stored_model(whole, "stage-2-c")
    family = grown["family"]
    assert grown["weighted_norms"] == (family != "llama") and not last["weighted_norms"]
    for model in (grown, last):
        assert (model["vocab_size"], model["padded_vocab"], model["live_vocab"]) == (400, 448, 320)
        assert (model["positions"], model["embed"]) == (48, 24)
    assert len(last["rope_exponents"]) == (6 if family == "llama" else 0)


def test_killed_while_annealing_it_ends_the_same(whole: Path, tmp_path: Path) -> None:
    config, folder = whole.with_name("config.yaml"), tmp_path / "run"
    # In the recovery; in the stage; in the last step of annealing; after it, resumed from a plain model.
    for place, steps in (("step=7", 6), ("step=5", 9), ("step=6", 13), ("step=4", 15)):
        ended = run(config, f"run.dir={folder}", strike=f"all:SIGKILL@{place}")
        assert ended.code == -signal.SIGKILL, ended.err
        assert len(lines(folder, "metrics")) == steps, place
    succeed(config, f"run.dir={folder}")
    assert record(folder) == record(whole)


def test_two_ranks_are_the_same_run(whole: Path, tmp_path: Path) -> None:
    config, folder = whole.with_name("config.yaml"), tmp_path / "run"
    succeed(config, f"run.dir={folder}", "parallel.tp=2", ranks=2)
    left_out = (*TIMINGS, COMMUNICATION, "recut", "max_logit_diff", "max_logit_diff_rel")
    assert differences(record(folder, left_out), record(whole, left_out), 1e-7) == []
    assert results(folder)["stages"][1]["growth"]["max_logit_diff_rel"] < 1e-10
