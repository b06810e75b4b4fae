"""Where a rank stands: its last collectives, and the Python stacks of its threads."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from elle_mp.parallel.flight_recorder import Collective

LAST = 3
"""Collectives of a rank that are told, besides those that wait."""
OURS = f"{os.sep}elle_mp{os.sep}"
THEIRS = f"{os.sep}torch{os.sep}distributed{os.sep}"


@dataclass(frozen=True)
class Process:
    """What the other ranks know of a rank's process.

    Attributes:
        host: its machine.
        space: which process numbers are the same as its own: those of the same host and space.
        number: of the process.
        started: when, in the kernel's ticks; another process may get the number later.
    """

    host: str
    space: str
    number: int
    started: str

    @classmethod
    def mine(cls) -> Process:
        """This process."""
        return cls(os.uname().nodename, _space(), os.getpid(), _status(os.getpid())[1])

    @property
    def state(self) -> str:
        """``gone``, ``stopped``, ``running``, or ``far`` when it cannot be seen from here."""
        if (self.host, self.space) != (os.uname().nodename, _space()) or not self.space:
            return "far"
        letter, started = _status(self.number)
        if started != self.started or letter in "ZX":
            return "gone"
        return "stopped" if letter in "Tt" else "running"

    def __str__(self) -> str:
        return f"process {self.number} on {self.host}"


def _space() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _status(number: int) -> tuple[str, str]:
    """State and start of a process, as the kernel tells them; ``("X", "")`` of one that there is not."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "X", ""
    return fields[0], fields[19]


@dataclass(frozen=True)
class Report:
    """Where one rank stands.

    Attributes:
        place: the innermost line of ours that its main thread is in, ``batches.py:77 (batch)``.
        in_torch: the innermost line of all is torch.distributed's: it waits for another rank.
        waiting: collectives that have not ended, in the order in which they were entered.
        ended: the last ones that have.
        entered: the number of the last collective of each group, by the group's name.
        stacks: of all threads, as text.
    """

    rank: int
    process: Process
    place: str
    in_torch: bool
    waiting: Sequence[Collective]
    ended: Sequence[Collective]
    entered: Mapping[str, int]
    stacks: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Report:
        """The inverse of :meth:`to_json`."""
        lists = {key: [Collective.from_json(item) for item in fields[key]] for key in ("waiting", "ended")}
        return cls(**fields | lists | {"process": Process(**fields["process"])})

    def text(self) -> str:
        """A block of the file."""
        lines = [f"=== rank {self.rank}, {self.process}: in {self.place}"]
        lines += [f"waits in {_described(item)}, entered {item.age:.1f} s ago" for item in self.waiting]
        lines += [f"has ended {_described(item)}, entered {item.age:.1f} s ago" for item in self.ended]
        if not (self.waiting or self.ended):
            lines.append("no collective is on record")
        return "\n".join([*lines, "", self.stacks])


def _described(item: Collective) -> str:
    return f"{item} (ranks {', '.join(map(str, item.ranks))}; {item.shapes or 'no tensor'})"


def report(rank: int, found: Sequence[Collective], error: BaseException | None = None) -> Report:
    """Of this rank, from whatever thread.

    Args:
        found: its last collectives.
        error: what has ended the main thread's work; where it came from is the place then.
    """
    frames = sys._current_frames()
    main = threading.main_thread().ident or 0
    inner = frames.get(main)
    if error is not None and error.__traceback__ is not None:
        inner = list(traceback.walk_tb(error.__traceback__))[-1][0]
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    skipped = {threading.get_ident()} - {main}
    stacks = [
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in frames.items()
        if ident not in skipped
    ]
    if error is not None:
        stacks.insert(0, "".join(traceback.format_exception(error)))
    return Report(
        rank,
        Process.mine(),
        place_of(inner),
        in_torch(inner),
        [item for item in found if item.waiting],
        [item for item in found if not item.waiting][-LAST:],
        {item.name: item.number for item in found if not item.transfer},
        "\n".join(stacks),
    )


def place_of(frame: FrameType | None) -> str:
    """The innermost line of ours of a stack; of all, when none is."""
    at = frame
    while at is not None and OURS not in at.f_code.co_filename:
        at = at.f_back
    at = at or frame
    return "no Python" if at is None else f"{Path(at.f_code.co_filename).name}:{at.f_lineno} ({at.f_code.co_name})"


def in_torch(frame: FrameType | None) -> bool:
    """Whether the innermost line of a stack is torch.distributed's."""
    return frame is not None and THEIRS in frame.f_code.co_filename
