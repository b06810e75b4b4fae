"""Signals: remembered while training, and everything as before afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from elle_mp.train.signals import StopRequest, ending


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_remembered(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
        assert stop.signal == number
    assert signal.getsignal(number) is before


def test_sigterm_may_come_twice() -> None:
    """A batch system repeats it; only a person who presses Ctrl-C again means at once."""
    with StopRequest() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop()


def test_handlers_come_back_after_an_error() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ZeroDivisionError), StopRequest():
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), ending(clean_up=True):
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


ENDING = """
import os, pathlib, signal, sys
from elle_mp.train.signals import ending
file = pathlib.Path(sys.argv[1])
try:
    with ending(clean_up=sys.argv[2] == "clean"):
        file.write_text("half")
        os.kill(os.getpid(), getattr(signal, sys.argv[3]))
        print("went on")
finally:
    file.unlink()
"""


@pytest.mark.parametrize(("how", "left"), [("clean", False), ("at-once", True)])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_before_the_first_step_a_signal_ends_the_process(how: str, left: bool, name: str, tmp_path: Path) -> None:
    file = tmp_path / "half"
    ended = subprocess.run(
        [sys.executable, "-c", ENDING, str(file), how, name],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    number = getattr(signal, name)
    assert ended.returncode == (128 + number if how == "clean" else -number)
    assert file.exists() is left
    assert (ended.stdout, ended.stderr) == ("", "")


def test_handlers_nest() -> None:
    """The tokenizer's training ends at once within the preparation that cleans up."""
    before = signal.getsignal(signal.SIGTERM)
    with ending(clean_up=True):
        outer = signal.getsignal(signal.SIGTERM)
        with ending(clean_up=False):
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is outer
        with pytest.raises(SystemExit) as end:
            os.kill(os.getpid(), signal.SIGTERM)
        assert end.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
