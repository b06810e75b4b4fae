"""What a run directory holds while a run goes, is killed, and goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from elle_mp.observe.journal import Journal, Place


def _run(journal: Journal, first: int, last: int, scale: float = 1.0) -> None:
    """Steps ``first`` to ``last``, with an evaluation at every fourth."""
    journal.start(first - 1)
    with journal.phase(0, 2, "train", "docs", first - 1, 100):
        for step in range(first, last + 1):
            place = Place(step, 0, "train", "docs", step * 10)
            journal.step(place, scale * step, 1e-3, 0.5, 10, 1e6, 0.01, step)
            if step % 4 == 0:
                journal.evaluation(place, {"ppl": {"docs": scale * step}, "ap": scale * step, "ap_plus": None})


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_fields_of_a_line(tmp_path: Path) -> None:
    _run(Journal(tmp_path, True, 2, False, peak=1e9), 1, 4)
    assert [record["step"] for record in _lines(tmp_path / "metrics.jsonl")] == [2, 4]
    fields = ["step", "stage", "phase", "domain", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "mfu"]
    record = _lines(tmp_path / "metrics.jsonl")[1]
    assert list(record) == fields
    assert record["tokens_per_second"] == pytest.approx(1000.0) and record["mfu"] == pytest.approx(0.1)
    assert list(_lines(tmp_path / "evals.jsonl")[0]) == [*fields[:5], "ppl", "ap", "ap_plus"]


def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    _run(Journal(tmp_path, True, 1, False, peak=1.0), 1, 9)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "sta')
    _run(Journal(tmp_path, True, 1, False, peak=1.0), 7, 8, scale=2.0)
    losses = {record["step"]: record["loss"] for record in _lines(tmp_path / "metrics.jsonl")}
    assert losses == {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 6, 7: 14, 8: 16}
    assert [(record["step"], record["ap"]) for record in _lines(tmp_path / "evals.jsonl")] == [(4, 4.0), (8, 16.0)]


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = Journal(tmp_path, False, 1, True, peak=1.0)
    _run(journal, 1, 4)
    journal.results({"stages": []})
    journal.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr() == ("", "")
