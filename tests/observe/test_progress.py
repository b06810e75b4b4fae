"""The bar in a real (pseudo-)terminal, and the lines where there is none."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from rich.console import Console

from elle_mp.observe.progress import NullProgress, Progress

SCRIPT = """
import sys, time
from elle_mp.observe.progress import Progress
progress = Progress()
with progress.phase(1, 3, "recover", "code", 40, 150):
    for step in range(41, 101):
        progress.update(step, 5.0, 6543.2)
        time.sleep(0.005)
        if step == 60:
            progress.say("perplexity [bold]12.34[/bold] :smile: " + "x" * 100)
    if len(sys.argv) > 1:
        raise ValueError("boom")
print("after")
"""


def _in_terminal(tmp_path: Path, columns: int, *arguments: str, term: str = "xterm-256color") -> tuple[str, int]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = os.environ | {"TERM": term, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("COLUMNS", None)
    process = subprocess.Popen([sys.executable, str(script), *arguments], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    output = b""
    while True:
        try:
            chunk = os.read(ours, 1 << 16)
        except OSError:  # how Linux reports that the other side has closed
            break
        if not chunk:
            break
        output += chunk
    os.close(ours)
    return output.decode(), process.wait()


def _plain(output: str) -> str:
    import re

    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output)


def test_the_bar_says_where_the_run_stands(tmp_path: Path) -> None:
    output, code = _in_terminal(tmp_path, 80)
    plain = _plain(output)
    assert code == 0
    last = [line for line in plain.replace("\r", "\n").split("\n") if "100/150" in line][-1]
    for part in ("stage 2/3 code recover", "loss 5.000", "6,543 tok/s", "left"):
        assert part in last
    assert "perplexity [bold]12.34[/bold] :smile: " + "x" * 100 in plain.replace("\r\n", "")
    assert output.count("\x1b[?25l") == output.count("\x1b[?25h") == 1  # cursor hidden and shown again


def test_the_terminal_is_restored_when_something_fails(tmp_path: Path) -> None:
    output, code = _in_terminal(tmp_path, 100, "fail")
    assert code == 1
    assert output.rindex("\x1b[?25h") < output.index("Traceback")
    assert "ValueError: boom" in output


def test_a_dumb_terminal_gets_no_escapes(tmp_path: Path) -> None:
    output, code = _in_terminal(tmp_path, 100, term="dumb")
    assert code == 0 and "\x1b" not in output and "after" in output


def test_a_log_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # CI sets it; a log is no terminal for all that
    file = io.StringIO()
    progress = Progress(Console(file=file, no_color=True), log_seconds=0.0)
    with progress.phase(0, 2, "train", "docs", 10, 13):
        for step in (11, 12, 13):
            progress.update(step, 4.5678, 12345.6)
        progress.say("[docs] done :smile:")
    assert file.getvalue().splitlines() == [
        "stage 1/2 docs train: step 11/13, loss 4.568, 12,346 tokens/s, 0:00:00 left",
        "stage 1/2 docs train: step 12/13, loss 4.568, 12,346 tokens/s, 0:00:00 left",
        "stage 1/2 docs train: step 13/13, loss 4.568, 12,346 tokens/s",
        "[docs] done :smile:",
    ]


def test_a_log_is_not_flooded_and_the_time_left_counts_this_process_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("elle_mp.observe.progress.time.monotonic", lambda: now)
    file = io.StringIO()
    progress = Progress(Console(file=file, width=200))
    with progress.phase(0, 1, "train", "docs", 100, 200):
        for step in range(101, 126):  # 25 of 100 steps, one a second
            now += 1.0
            progress.update(step, 1.0, 1.0)
    lines = file.getvalue().splitlines()
    assert [line.split(":")[1].split(",")[0] for line in lines] == [" step 110/200", " step 120/200"]
    assert lines[1].endswith("0:01:20 left")


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    progress = NullProgress()
    with progress.phase(0, 1, "train", "docs", 0, 2):
        progress.update(1, 1.0, 1.0)
        progress.say("text")
    assert capsys.readouterr() == ("", "")
