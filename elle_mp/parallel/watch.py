"""Watches over a job of several ranks: what goes wrong on one is told once, first, and ends all of them.

A thread of every rank looks at its own collectives and at the noticeboard; it does nothing else while all goes well.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from threading import Event, Thread, main_thread
from types import TracebackType

import torch.distributed as dist

from elle_mp.data.files import write_whole
from elle_mp.errors import UserError, error_line
from elle_mp.parallel.diagnosis import absent_line, hang_line
from elle_mp.parallel.flight_recorder import collectives
from elle_mp.parallel.noticeboard import Incident, Noticeboard
from elle_mp.parallel.peer_errors import TIMED_OUT, comes_from_a_peer
from elle_mp.parallel.rank_report import Process, Report, in_torch, report
from elle_mp.parallel.time_limits import MARGIN, TimeLimits

GLANCE = 0.5
"""Seconds between two looks at the noticeboard, up to :data:`CROWD` ranks; with more of them longer."""
CROWD = 512
ANSWER = 4.0
"""Seconds that other ranks have to say where they stand."""
GRACE = 6.0
"""Seconds that a rank has to end by itself once something has happened."""
USER_ERROR, FAILED, INTERRUPTED = 2, 1, 130


class Watch:
    """Context of all the work of a job; on one rank alone it does nothing.

    An error that leaves it is told by the rank that had it first, as one line or with its traceback. The ranks that
    fail only because that one is gone say nothing. All exit with the same code, within seconds.

    Attributes:
        limits: the time-outs of the process groups, for whoever knows what comes next.
        folder: where the file of a hang goes; none is written without it.
    """

    def __init__(self) -> None:
        self.limits = TimeLimits()
        self.folder: Path | None = None
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._board: Noticeboard | None = None
        self._over = Event()
        self._thread = Thread(target=self._watch, name="watch", daemon=True)
        self._error: BaseException | None = None
        self._first_seen: dict[int, float] = {}
        self._stood: tuple[object, float] = (None, 0.0)
        self._neighbour: Process | None = None

    def __enter__(self) -> Watch:
        if self._size > 1 and "MASTER_ADDR" in os.environ:
            self._board = Noticeboard(self._rank, self._size)
            self._board.sign_in()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        board = self._board
        if board is None:
            return
        if error is None:
            self._sign_out(board)
            return
        self._error = error
        code = self._end(board, error)
        # What cleans up behind this may wait for ranks that never answer.
        Thread(target=leave_later, args=(code,), daemon=True).start()
        self._sign_out(board)
        sys.stdout.flush()
        raise SystemExit(code) from None

    def _sign_out(self, board: Noticeboard) -> None:
        """Ends the watching. Before Python 3.14 an interpreter that ends while a thread is in the store aborts."""
        self._over.set()
        self._thread.join()
        quietly(board.sign_out)

    # When this rank fails

    def _end(self, board: Noticeboard, error: BaseException) -> int:
        """Tells the error if it is the job's first; returns the exit code."""
        incident = incident_of(error, self._rank)
        try:
            board.check()
            if not board.claim(incident):
                return self._follow(board)
            if incident.kind == "failed":
                tell(error)
            elif incident.kind in ("hang", "lost"):
                self._investigate(board, incident)
            board.close_incident()
        except dist.DistError:
            self._tell_without_board(error, incident)
        return incident.code

    def _follow(self, board: Noticeboard) -> int:
        """Lets the rank speak that was first."""
        incident = board.incident()
        self._await(board, GRACE)
        return FAILED if incident is None else incident.code

    def _await(self, board: Noticeboard, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not board.told() and time.monotonic() < deadline:
            time.sleep(GLANCE / 10)

    def _tell_without_board(self, error: BaseException, incident: Incident) -> None:
        """Rank 0 has the store, unless torchrun has: without it nobody knows who else speaks."""
        if incident.kind in ("failed", "left"):
            tell(error)
        elif self._rank == 1:
            say("rank 0, or what started it, is gone (killed?): the ranks' store does not answer")

    # When something happens elsewhere, or nothing at all

    def _watch(self) -> None:
        pause = GLANCE * max(1.0, self._size / CROWD)
        while not self._over.wait(pause):
            board = self._board
            if board is None:
                return
            try:
                board.check()
                incident = board.incident()
                if incident is None:
                    incident = self._found()
                    if incident is not None and board.claim(incident):
                        self._investigate(board, incident)
                        board.close_incident()
            except dist.DistError:
                if self._stuck() is not None:
                    self._write_alone()
                    leave(FAILED)
                continue
            if incident is not None and not self._over.is_set():
                self._leave(incident)

    def _found(self) -> Incident | None:
        """What this rank alone can see."""
        if self._stuck() is not None:
            return Incident("hang", self._rank, FAILED)
        return Incident("lost", self._rank, FAILED) if self._neighbour_is_gone() else None

    def _neighbour_is_gone(self) -> bool:
        """Whether the next rank, on this machine, has ended without a word."""
        rank, board = (self._rank + 1) % self._size, self._board
        if board is None:
            return False
        self._neighbour = self._neighbour or board.process(rank)
        gone = self._neighbour is not None and self._neighbour.state == "gone"
        return gone and not board.has_left(rank) and board.incident() is None

    def _stuck(self) -> str | None:
        """What this rank has waited in for longer than it may, by the clock of this thread."""
        now, found = time.monotonic(), collectives()
        waiting = {item.record: item for item in found if item.waiting}
        self._first_seen = {record: self._first_seen.get(record, now) for record in waiting}
        for record, item in waiting.items():
            if now - self._first_seen[record] > item.limit - MARGIN:
                return str(item)
        # A transfer over gloo is on no record: the main thread stands in torch and nothing is entered.
        frame = sys._current_frames().get(main_thread().ident or 0)
        stands = None if waiting or not found or frame is None or not in_torch(frame) else (id(frame), frame.f_lasti)
        place = (stands, found[-1].record) if stands is not None else None
        if place is None or self._stood[0] != place:
            self._stood = (place, now)
        return "a transfer" if place is not None and now - self._stood[1] > self.limits.now > 0 else None

    def _leave(self, incident: Incident) -> None:
        """Ends this process, from the watching thread: the main one may never come back."""
        board = self._board
        try:
            if board is not None and incident.kind in ("hang", "lost"):
                board.post(self._report())
                self._await(board, ANSWER + GRACE)
        except dist.DistError:
            self._over.wait(GLANCE)
        # By itself it can let a save in the background end, and clean up.
        if self._over.wait(GRACE if incident.kind != "hang" else 0.0):
            return
        if board is not None:
            quietly(board.sign_out)
        leave(incident.code)

    def _report(self) -> Report:
        return report(self._rank, collectives(), self._error)

    def _investigate(self, board: Noticeboard, incident: Incident) -> None:
        """Hears all ranks, and tells the user in one line; a hang also in a file."""
        mine = self._report()
        board.post(mine)
        reports, absent = self._hear(board, mine)
        if incident.kind == "hang":
            where = self._write("".join(item.text() + "\n" for item in reports), absent, hang_line(reports, absent))
            say(f"nothing goes on: {hang_line(reports, absent)}{where}")
        elif absent:
            say(absent_line(absent))
        else:
            cause = "" if self._error is None else f": {str(self._error).splitlines()[0]}"
            say(f"rank {self._rank} has lost its connection to another rank, and all are still there{cause}")

    def _hear(self, board: Noticeboard, mine: Report) -> tuple[list[Report], dict[int, Process]]:
        """The reports, in order, and the processes of those that do not answer."""
        reports, deadline = {self._rank: mine}, time.monotonic() + ANSWER
        silent = set(range(self._size)) - {self._rank}
        processes = {rank: process for rank in silent if (process := board.process(rank)) is not None}
        while silent and time.monotonic() < deadline:
            for rank in sorted(silent):
                found = board.report(rank)
                if found is not None:
                    reports[rank] = found
            silent -= reports.keys()
            if all(rank in processes and processes[rank].state in ("gone", "stopped") for rank in silent):
                break
            time.sleep(GLANCE / 10)
        unknown = Process("an unknown host", "", 0, "")
        return [reports[rank] for rank in sorted(reports)], {rank: processes.get(rank, unknown) for rank in silent}

    def _write(self, blocks: str, absent: dict[int, Process], line: str, suffix: str = "") -> str:
        """The file of a hang, whole; returns what the line says of it."""
        if self.folder is None:
            return ""
        now = datetime.now(timezone.utc)
        path = self.folder / f"hang-{now:%Y%m%dT%H%M%SZ}{suffix}.txt"
        head = f"{now:%Y-%m-%d %H:%M:%S} UTC, {self._size} ranks: {line}\n\n"
        lost = "".join(f"=== {absent_line({rank: process})}, {process}\n\n" for rank, process in absent.items())
        try:
            write_whole(path, (head + lost + blocks).encode())
        except UserError as error:
            return f"; {error}"
        return f"; every rank's last collective and stacks: {path}"

    def _write_alone(self) -> None:
        """Without the noticeboard every rank has a file of its own, and rank 1 speaks."""
        line = "the ranks' store does not answer: rank 0, or what started it, is stopped or gone"
        where = self._write(self._report().text(), {}, line, f"-rank{self._rank}")
        if self._rank == 1:
            say(f"nothing goes on: {line}{where}")


def incident_of(error: BaseException, rank: int) -> Incident:
    """What the end of a rank's work by an error means to the job."""
    if isinstance(error, KeyboardInterrupt):
        return Incident("left", rank, INTERRUPTED)
    if isinstance(error, SystemExit):
        return Incident("left", rank, error.code if isinstance(error.code, int) else FAILED)
    if comes_from_a_peer(error):
        return Incident("hang" if TIMED_OUT in str(error) else "lost", rank, FAILED)
    return Incident("failed", rank, USER_ERROR if isinstance(error, UserError) else FAILED)


def tell(error: BaseException) -> None:
    """A user's mistake in one line; anything else with its traceback."""
    if isinstance(error, UserError):
        say(str(error))
    elif not isinstance(error, (SystemExit, KeyboardInterrupt)):
        traceback.print_exception(error)
        sys.stderr.flush()


def say(message: str) -> None:
    """One line of standard error, in one write."""
    sys.stderr.write(error_line(message) + "\n")
    sys.stderr.flush()


def leave_later(code: int) -> None:
    """:func:`leave`, unless the interpreter has ended by then."""
    time.sleep(GRACE)
    leave(code)


def leave(code: int) -> None:
    """Ends the process whatever its threads do."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def quietly(work: Callable[[], object]) -> None:
    """Does what no longer matters if the store has gone."""
    try:
        work()
    except dist.DistError:
        return
