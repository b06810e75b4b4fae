"""From what all ranks tell of themselves to one line: which rank holds the others up, and where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from elle_mp.parallel.flight_recorder import Collective
from elle_mp.parallel.rank_report import Process, Report
from elle_mp.parallel.time_limits import SAVING

SILENT = {"gone": "is gone (killed?)", "stopped": "is stopped (SIGSTOP?)"}
"""Why a rank does not answer, by the state of its process."""
TOLD = 4
"""Ranks that a line names; the file has all."""


def absent_line(processes: Mapping[int, Process]) -> str:
    """What is known of the ranks that do not answer: ``rank 1 is gone (killed?)``."""
    lines = []
    for rank, process in sorted(processes.items())[:TOLD]:
        lines.append(f"rank {rank} {SILENT.get(process.state, f'does not answer ({process})')}")
    return _joined(lines, len(processes))


def hang_line(reports: Sequence[Report], absent: Mapping[int, Process]) -> str:
    """Why nothing goes on: first of all who does not answer, then who has not entered what others wait in."""
    if absent:
        waits = next((f"; rank {item.rank} waits in {_waits(item)[0]}" for item in reports if item.waiting), "")
        return absent_line(absent) + waits
    late = _late(reports)
    free = [item for item in reports if not _training_waits(item)]
    blamed = [item for item in free if not item.in_torch and (item.rank in late or not late)]
    blamed = blamed or [item for item in free if item.rank in late]
    if not blamed:
        return _crossed(reports)
    lines = []
    for item in blamed[:TOLD]:
        entered = f"never entered {late[item.rank]}" if item.rank in late else "is in no collective"
        lines.append(f"rank {item.rank} {entered}; it is in {item.place}")
    return _joined(lines, len(blamed))


def _training_waits(item: Report) -> list[Collective]:
    """What a rank's main thread waits in: saves in the background have a thread and a group of their own."""
    return [collective for collective in item.waiting if collective.group != SAVING]


def _waits(item: Report) -> Sequence[Collective]:
    return _training_waits(item) or item.waiting


def _late(reports: Sequence[Report]) -> dict[int, Collective]:
    """The first collective that another rank waits in and this one has not entered, by rank."""
    entered = {item.rank: item.entered for item in reports}
    late: dict[int, Collective] = {}
    for item in reports:
        for collective in _waits(item):
            for rank in () if collective.transfer else collective.ranks:
                if entered.get(rank, {}).get(collective.name, 0) < collective.number:
                    late.setdefault(rank, collective)
    return late


def _crossed(reports: Sequence[Report]) -> str:
    """Every rank waits: in what."""
    lines = []
    for item in reports[:TOLD]:
        what = _waits(item)[0] if item.waiting else "a transfer"
        lines.append(f"rank {item.rank} waits in {what} ({item.place})")
    return _joined(lines, len(reports))


def _joined(lines: Sequence[str], count: int) -> str:
    more = f", and {count - len(lines)} ranks more" if count > len(lines) else ""
    return ", ".join(lines) + more
