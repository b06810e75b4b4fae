"""The progress of a phase: a bar in a terminal, a plain line every few seconds in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as RichProgress

LOG_SECONDS = 10.0


class Progress:
    """Shows where a run stands.

    Args:
        console: where to; standard output when not given.
        log_seconds: time between two lines where there is no terminal.
    """

    def __init__(self, console: Console | None = None, log_seconds: float = LOG_SECONDS) -> None:
        self.console = console or Console(highlight=False)
        self.log_seconds = log_seconds
        self._bar: RichProgress | None = None
        self._label, self._started, self._total = "", 0, 0
        self._began = self._said = 0.0

    def say(self, text: str) -> None:
        """Prints a line (above the bar, when there is one), as it is: brackets and colons mean nothing."""
        self.console.print(text, soft_wrap=True, markup=False, emoji=False, highlight=False)

    @contextmanager
    def phase(self, stage: int, stages: int, phase: str, domain: str, done: int, total: int) -> Iterator[None]:
        """Shows one phase; the terminal is as before afterwards, whatever happened.

        Args:
            stage: index of the stage, from 0.
            done: steps of the phase that an earlier process did.
        """
        self._label, self._started, self._total = f"stage {stage + 1}/{stages} {domain} {phase}", done, total
        self._began = self._said = time.monotonic()
        if not self._is_terminal():
            yield
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
        )
        with RichProgress(*columns, console=self.console, transient=True) as bar:
            bar.add_task(self._label, total=total, completed=done, figures="")
            self._bar = bar
            try:
                yield
            finally:
                self._bar = None

    def update(self, done: int, loss: float, speed: float) -> None:
        """``done`` steps of the phase are finished; ``speed`` is in tokens per second."""
        figures = f"loss {loss:.3f}  {speed:,.0f} tok/s"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, figures=figures)
            return
        now = time.monotonic()
        if now - self._said >= self.log_seconds or done == self._total:
            self._said = now
            text = f"{self._label}: step {done}/{self._total}, loss {loss:.3f}, {speed:,.0f} tokens/s"
            left = (self._total - done) * (now - self._began) / max(done - self._started, 1)
            self.say(text if done == self._total else f"{text}, {timedelta(seconds=round(left))} left")

    def _is_terminal(self) -> bool:
        """Whether a line can be drawn over. ``FORCE_COLOR`` in a CI log makes no terminal of it."""
        return self.console.file.isatty() and not self.console.is_dumb_terminal


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


@contextmanager
def byte_progress(console: Console, label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows how many of ``total`` bytes are done: a bar in a terminal, a line every few seconds in a log.

    Yields:
        A function that takes the bytes done since its last call.
    """
    if console.file.isatty() and not console.is_dumb_terminal:
        columns = (BarColumn(bar_width=20), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(compact=True))
        with RichProgress(TextColumn("{task.description}"), *columns, console=console, transient=True) as bar:
            task = bar.add_task(label, total=total)
            yield lambda count: bar.advance(task, count)
        return
    done, said = 0, time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, said
        done += count
        if time.monotonic() - said >= LOG_SECONDS:
            said = time.monotonic()
            console.print(f"{label}: {done / 1e9:.2f} of {total / 1e9:.2f} GB", markup=False)

    yield advance


@contextmanager
def count_progress(console: Console, label: str, total: int) -> Iterator[Callable[[str], None]]:
    """Shows which of ``total`` things is being done: a bar in a terminal, a line every few seconds in a log.

    Yields:
        A function to call with the name of each thing before it is done.
    """
    if console.file.isatty() and not console.is_dumb_terminal:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=20), MofNCompleteColumn())
        with RichProgress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(label, total=total, completed=-1)
            yield lambda name: bar.update(task, advance=1, description=f"{label} {name}")
        return
    begun, said = 0, time.monotonic()

    def begin(name: str) -> None:
        nonlocal begun, said
        begun += 1
        if time.monotonic() - said >= LOG_SECONDS:
            said = time.monotonic()
            console.print(f"{label} {begun} of {total}: {name}", markup=False)

    yield begin
