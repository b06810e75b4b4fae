"""Lines of JSON after kills and on full disks; event files after a resume."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from elle_mp.errors import UserError
from elle_mp.observe.metrics import JsonLines, TensorBoardWriter, write_json


def _steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "torn", [b"", b'{"step": 5, "lo', b'{"step": 5}', b"nul", b"7\n", b'{"step": "\xe9', b"\0\0\0\0"]
)
def test_a_resume_drops_later_lines_and_a_torn_one(tmp_path: Path, torn: bytes) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    for step in range(1, 5):
        lines.append({"step": step, "domain": "d\u2028\u00e9"})
    with lines.path.open("ab") as file:
        file.write(torn)
    again = JsonLines(lines.path)
    again.truncate_after(lambda record: record["step"] <= 2)
    assert _steps(lines.path) == [1, 2]
    again.append({"step": 3})
    assert _steps(lines.path) == [1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_whole_record_without_its_line_feed_stays_and_gets_one(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.path.write_text('{"step": 1}\n{"step": 2}')
    lines.truncate_after(lambda record: True)
    lines.append({"step": 3})
    assert _steps(lines.path) == [1, 2, 3]


def test_nothing_to_drop_leaves_the_file_alone(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.truncate_after(lambda record: False)
    assert not lines.path.exists()
    lines.append({"step": 1})
    before = lines.path.stat()
    lines.truncate_after(lambda record: True)
    assert lines.path.stat().st_ino == before.st_ino


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.append({"loss": math.nan, "ppl": {"docs": math.inf, "code": 2.5}, "list": [-math.inf, 1], "text": "NaN"})
    write_json(tmp_path / "results.json", {"ap": math.inf, "stages": ({"ppl": math.nan},)})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(lines.path.read_text(), parse_constant=refuse) == {
        "loss": None,
        "ppl": {"docs": None, "code": 2.5},
        "list": [None, 1],
        "text": "NaN",
    }
    whole = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert whole == {"ap": None, "stages": [{"ppl": None}]}


def test_what_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for write in (
        lambda: JsonLines(tmp_path / "file" / "metrics.jsonl").append({"step": 1}),
        lambda: write_json(tmp_path / "file" / "results.json", {}),
    ):
        with pytest.raises(UserError, match=r"cannot write .*(metrics\.jsonl|results\.json)") as raised:
            write()
        assert "\n" not in str(raised.value)


def test_event_files_of_a_killed_run_are_purged_beyond_the_checkpoint(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    killed = TensorBoardWriter(tmp_path, purge_step=1)
    for step in range(1, 7):
        killed.scalars({"train/loss": float(step)}, step)
    on_disk = EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
    assert [event.step for event in on_disk] == [1, 2, 3, 4, 5, 6]  # before it was closed
    resumed = TensorBoardWriter(tmp_path, purge_step=4)
    for step in range(4, 6):
        resumed.scalars({"train/loss": 10.0 * step}, step)
    resumed.close()
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in events] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 50.0)]
    killed.close()
