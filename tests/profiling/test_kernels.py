"""``profile kernels`` and ``profile compare``: real measurements of tiny shapes, and ratios of hand-made numbers."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from elle_mp.cli import main as program
from elle_mp.errors import UserError
from elle_mp.profiling.compare import compare
from elle_mp.profiling.entry import Case, Entry
from elle_mp.profiling.kernels import measure
from elle_mp.profiling.machine import Ceilings
from elle_mp.profiling.measure import peak_memory, spread, time_in_turns
from elle_mp.profiling.page import kernels_page
from elle_mp.profiling.registry import ENTRIES, chosen
from elle_mp.profiling.results import KERNELS, STEP
from elle_mp.profiling.roofline import Axes
from elle_mp.profiling.tables import difference_lines

CPU = torch.device("cpu")
CEILINGS = Ceilings(1e10, {"float32": 1e11, "bfloat16": 2e11})
TINY = {"BxSxHxD": (1, 40, 2, 16), "BxSxD": (2, 24, 32), "NxDxV": (24, 16, 96), "BxSxDxV": (2, 24, 32, 50)}


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_entry_agrees_with_its_peers_and_is_measured(entry: Any) -> None:
    shape = TINY.get(entry.dims.split(":")[0], (8, 12))
    for dtype in entry.dtypes:
        rows = measure(entry, shape, dtype, CEILINGS, CPU, 0.0)
        assert {row["pass"] for row in rows} == ({"forward", "forward+backward"} if entry.backward else {"forward"})
        for row in rows:
            assert row["low"] <= row["seconds"] <= row["high"]
            least = max(row["moved"] / 1e10, row["operations"] / CEILINGS.gemm[dtype])
            assert row["of_ceiling"] == pytest.approx(least / row["seconds"])
            ours = next(other for other in rows if other["side"] == "ours" and other["pass"] == row["pass"])
            assert row["ratio"] == pytest.approx(row["seconds"] / ours["seconds"])
        assert len(rows) > len({row["pass"] for row in rows})  # somebody to compare with


def unlike(name: str, factor: float) -> Entry:
    """An op with a peer whose results are ours times a factor."""
    entry = next(entry for entry in ENTRIES if entry.name == "rms_norm")

    def make(*place: Any) -> Case:
        case = entry.make(*place)
        return replace(case, peers={name: lambda backward: tuple(factor * x for x in case.ours(backward))})

    return replace(entry, make=make)


def test_sides_that_differ_are_not_timed() -> None:
    place = (1, 4, 8), "float32", CEILINGS, CPU, 0.0
    with pytest.raises(UserError, match=r"wrong differs by 0\.09"):
        measure(unlike("wrong", 1.1), *place)
    with pytest.raises(UserError, match=r"reference differs by 0\.005"):
        measure(unlike("reference", 1.005), *place)
    with pytest.raises(UserError, match="differs by inf"):
        measure(unlike("wrong", float("nan")), *place)


def test_a_peer_that_rounds_more_is_timed_and_told() -> None:
    rows = measure(unlike("loose", 1.005), (1, 4, 8), "float32", CEILINGS, CPU, 0.0)
    assert [row["difference"] for row in rows if row["side"] == "loose"] == pytest.approx([0.005 / 1.005] * 2, rel=1e-3)
    lines = difference_lines({"rows": rows})
    assert lines[0] == "loose differs from ours by 0.5% of the largest entry: rms_norm 1x4x8 float32 forward"
    assert len(lines) == 2


def test_sides_take_turns_and_the_first_round_does_not_count() -> None:
    calls: list[str] = []
    runs = {name: lambda _, name=name: (calls.append(name), ())[1] for name in ("a", "b")}
    times = time_in_turns(runs, False, 0.0, CPU)
    assert calls == ["a", "b", "b", "a"] * 2
    assert times.keys() == {"a", "b"}
    first = [0.2]
    slow_at_first = time_in_turns({"a": lambda _: (time.sleep(first.pop() if first else 0.0), ())[1]}, False, 0.0, CPU)
    assert slow_at_first["a"].high < 0.05  # three values: a first one would be half of the upper quartile
    assert spread([4.0, 1.0, 2.0, 3.0, 5.0]) == type(spread([1.0, 2.0]))(3.0, 2.0, 4.0)


def test_peak_memory_is_what_lives_at_once() -> None:
    def run(_: bool) -> tuple[torch.Tensor, ...]:
        torch.empty(3 << 20, dtype=torch.uint8)  # gone before the next
        return (torch.empty(1 << 20, dtype=torch.uint8), torch.empty(1 << 20, dtype=torch.uint8))

    assert 3 << 20 <= peak_memory(run, False, CPU) < (3 << 20) + 1024


def test_the_command_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, page = tmp_path / "a.json", tmp_path / "a.html"
    arguments = ["--op", "linear_cross_entropy", "--op", "rms_norm", "--shape", "16x8x32", "--dtype", "float32"]
    threads = torch.get_num_threads()
    try:
        command = [
            "profile",
            "kernels",
            *arguments,
            "--json",
            str(out),
            "--html",
            str(page),
            "--quick",
            "--threads",
            "1",
        ]
        assert exit_code(command) == 0
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    results = json.loads(out.read_text())
    assert results["kind"] == KERNELS
    assert results["machine"]["threads"] == 1
    assert results["machine"]["torch"] == torch.__version__
    assert {row["op"] for row in results["rows"]} == {"linear_cross_entropy", "rms_norm"}
    assert "rms_norm" in printed and "GFLOP/s in float32" in printed
    text = page.read_text()
    assert text == kernels_page(results)
    assert text.count("<circle") == 2 + 1  # two passes, one in the legend
    assert not re.search(r"https?://|<script|<link|src=", text)


def test_the_roofline_has_powers_of_ten_at_its_lines() -> None:
    axes = Axes((0.2, 50.0), (3.0, 400.0))
    assert [axes.x(value) for value in (0.1, 100.0)] == [80, 700]
    assert [axes.y(value) for value in (1.0, 1000.0)] == [460, 20]
    assert axes.x(1.0) - axes.x(0.1) == pytest.approx(axes.x(100.0) - axes.x(10.0))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--op", "nonsense"], "expanded_attention, "),
        (["--op", "rms_norm", "--shape", "4x"], "4x512x768"),
        (["--op", "rms_norm", "--shape", "4x8"], "rms_norm BxSxD"),
        (["--op", "rms_norm", "--dtype", "int8"], "float32, bfloat16"),
    ],
)
def test_a_wrong_wish_is_one_line_with_the_choices(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(["profile", "kernels", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and named in err


def test_quick_takes_one_shape_of_each() -> None:
    assert all(len(entry.shapes) == 1 for entry in chosen([], [], [], True))
    assert all(len(entry.shapes) > 1 for entry in chosen([], [], [], False))


def results(kind: str, seconds: dict[str, float], **machine: Any) -> dict[str, Any]:
    keys = {"op": "o", "shape": "1", "dtype": "float32", "pass": "forward"}
    rows = [keys | {"side": side, "part": side, "seconds": value} for side, value in seconds.items()]
    return {"kind": kind, "machine": {"torch": "1", "commit": "c"} | machine, "rows": rows}


def written(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize("kind", [KERNELS, STEP])
def test_compare_shows_ratios_and_what_differs(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = written(tmp_path / "a.json", results(kind, {"ours": 0.003, "SDPA": 0.01, "gone": 1.0}))
    b = written(tmp_path / "b.json", results(kind, {"ours": 0.002, "SDPA": 0.04}, torch="2"))
    compare(a, b)
    out = capsys.readouterr().out
    assert [line.split()[-3:] for line in out.splitlines() if "forward" in line] == [
        ["3", "2", "1.500"],
        ["10", "40", "0.250"],
    ]
    assert "torch: 1 -> 2" in out
    assert "commit" not in out
    assert f"only in {a}: 1 rows" in out


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "not JSON"),
        ([1], "not a file that"),
        ({"kind": "something"}, "not a file that"),
        ({"kind": KERNELS, "machine": {}, "rows": []}, "no rows"),
        ({"kind": KERNELS, "machine": {}, "rows": [{"op": "x"}]}, "lacks one of"),
        (results(STEP, {"ours": 1.0}), "two files of one kind"),
        (results(KERNELS, {"other": 1.0}), "no row in common"),
    ],
)
def test_compare_refuses_what_it_cannot_compare(
    content: Any, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = written(tmp_path / "good.json", results(KERNELS, {"ours": 1.0}))
    bad = written(tmp_path / "bad.json", content)
    assert exit_code(["profile", "compare", str(good), str(bad)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and told in err


def exit_code(arguments: list[str]) -> int | str | None:
    with pytest.raises(SystemExit) as end:
        program.main(arguments)
    return end.value.code
