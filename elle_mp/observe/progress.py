"""The progress of a phase: a bar in a terminal, a plain line every few seconds in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

LOG_SECONDS = 10.0


class Progress:
    """Shows where a run stands.

    Args:
        console: where to; standard output when not given.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._bar: RichProgress | None = None
        self._label, self._done, self._total = "", 0, 0
        self._said = 0.0

    def say(self, text: str) -> None:
        """Prints a line (above the bar, when there is one)."""
        self.console.print(text, soft_wrap=True, markup=False)

    @contextmanager
    def phase(self, stage: int, stages: int, phase: str, domain: str, done: int, total: int) -> Iterator[None]:
        """Shows one phase; the terminal is as before afterwards, whatever happened."""
        self._label, self._total = f"stage {stage + 1}/{stages} {domain} {phase}", total
        self._said = time.monotonic()
        if not self.console.is_terminal:
            yield
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tok/s"),
            TimeRemainingColumn(),
        )
        with RichProgress(*columns, console=self.console, transient=True) as bar:
            bar.add_task(self._label, total=total, completed=done, loss=float("nan"), speed=0.0)
            self._bar = bar
            try:
                yield
            finally:
                self._bar = None

    def update(self, done: int, loss: float, speed: float) -> None:
        """``done`` steps of the phase are finished; ``speed`` is in tokens per second."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, loss=loss, speed=speed)
        elif time.monotonic() - self._said >= LOG_SECONDS or done == self._total:
            self._said = time.monotonic()
            self.say(f"{self._label}: step {done}/{self._total}, loss {loss:.3f}, {speed:,.0f} tokens/s")


class NullProgress:
    """What the ranks other than the first show: nothing."""

    def say(self, text: str) -> None:
        """Prints nothing."""

    @contextmanager
    def phase(self, stage: int, stages: int, phase: str, domain: str, done: int, total: int) -> Iterator[None]:
        """Shows nothing."""
        yield

    def update(self, done: int, loss: float, speed: float) -> None:
        """Shows nothing."""
