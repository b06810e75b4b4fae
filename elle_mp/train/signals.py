"""Ctrl-C and SIGTERM: asked once, training saves and ends at a step's boundary; Ctrl-C twice ends at once."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

INTERRUPTED = 130
STOPPING = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def ending(clean_up: bool) -> Iterator[None]:
    """Context in which SIGINT and SIGTERM end the process: for work before the first step, with nothing to save.

    Args:
        clean_up: end by ``SystemExit``, so that half-written files are removed on the way out. Otherwise at once: for
            work that writes nothing and that the interpreter cannot leave (waiting for another rank, a library's loop).
    """

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave if clean_up else signal.SIG_DFL) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopRequest:
    """Context in which SIGINT and SIGTERM are remembered instead of obeyed."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in STOPPING:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        """Whether a signal has come."""
        return self.signal is not None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal is not None:
            # The process may be inside a collective that never ends: no clean-up, the last checkpoint stands.
            sys.stderr.write("\nelle-mp: interrupted twice, ending at once; the last checkpoint is intact\n")
            sys.stderr.flush()
            os._exit(INTERRUPTED)
        self.signal = signal.Signals(number)
