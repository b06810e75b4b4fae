"""What ranks tell each other while the process groups do not work: through the store that they met by."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from elle_mp.parallel.rank_report import Process, Report

PATIENCE = timedelta(seconds=10)
"""How long an answer of the store may take."""
CLOSING = 2.0
"""Seconds that other ranks have to end before the store does."""
INCIDENT = "incident"
LAUNCHERS_STORE = "TORCHELASTIC_USE_AGENT_STORE"
"""The variable that torchrun sets when it keeps the store; otherwise rank 0 does."""


@dataclass(frozen=True)
class Incident:
    """What ends the job. The first one counts.

    Attributes:
        kind: ``failed`` (a rank's own error), ``left`` (a signal), ``lost`` (a rank went away), ``hang``.
        rank: that has found it.
        code: what all ranks exit with.
    """

    kind: str
    rank: int
    code: int


class Noticeboard:
    """A connection of its own to the store: the one of the process groups may be waiting for something.

    Raises:
        DistError: from every method, when the store does not answer.
    """

    def __init__(self, rank: int, size: int) -> None:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=PATIENCE)  # type: ignore[attr-defined]
        # torchrun's store outlives a restart of the ranks.
        prefix = f"elle_mp/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._store = dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]
        self._rank, self._size = rank, size
        self._kept_by: Process | None = None

    def sign_in(self) -> None:
        """Says what process this rank is."""
        self._put("process", asdict(Process.mine()))

    def check(self) -> None:
        """Looks whether rank 0, which keeps the store unless torchrun does, can answer: torch would wait for it, and
        say at length that it does not.

        Raises:
            DistError: it is gone or stopped.
        """
        if LAUNCHERS_STORE in os.environ or self._rank == 0:
            return
        self._kept_by = self._kept_by or self.process(0)
        if self._kept_by is not None and self._kept_by.state in ("gone", "stopped"):
            raise dist.DistError("rank 0 does not answer, nor does the ranks' store")

    def sign_out(self) -> None:
        """Says that this rank ends and looks here no more. Rank 0, if it keeps the store, lets the others go first."""
        self._put("left", True)
        deadline = time.monotonic() + CLOSING
        waiting = self._rank == 0 and LAUNCHERS_STORE not in os.environ
        while waiting and time.monotonic() < deadline and not all(map(self.has_left, range(self._size))):
            time.sleep(0.05)

    def has_left(self, rank: int) -> bool:
        """Whether a rank has said that it ends."""
        return self._get("left", rank) is not None

    def process(self, rank: int) -> Process | None:
        """The process of a rank, once it has signed in."""
        fields = self._get("process", rank)
        return None if fields is None else Process(**fields)

    def incident(self) -> Incident | None:
        """What has happened, if anything has."""
        if not self._store.check([INCIDENT]):
            return None
        return Incident(**json.loads(self._store.get(INCIDENT)))

    def claim(self, incident: Incident) -> bool:
        """Makes it the job's incident, unless there is one; returns whether it is."""
        content = json.dumps(asdict(incident))
        return self._store.compare_set(INCIDENT, "", content) == content.encode()

    def post(self, report: Report) -> None:
        """Says where this rank stands."""
        self._put("report", report.to_json())

    def report(self, rank: int) -> Report | None:
        """Where a rank stands, once it has said so."""
        fields = self._get("report", rank)
        return None if fields is None else Report.from_json(fields)

    def close_incident(self) -> None:
        """Says that the user has been told."""
        self._store.set("told", "1")

    def told(self) -> bool:
        """Whether the user has been told."""
        return bool(self._store.check(["told"]))

    def _put(self, what: str, value: Any) -> None:
        self._store.set(f"{what}/{self._rank}", json.dumps(value))

    def _get(self, what: str, rank: int) -> Any:
        key = f"{what}/{rank}"
        return json.loads(self._store.get(key)) if self._store.check([key]) else None
