"""Ctrl-C and SIGTERM: asked once, the run saves and ends at a step's boundary; Ctrl-C twice ends at once."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Any

INTERRUPTED = 130


class StopRequest:
    """Context in which SIGINT and SIGTERM are remembered instead of obeyed."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
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
