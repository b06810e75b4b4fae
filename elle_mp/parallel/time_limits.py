"""How long ranks wait for each other: long while the job starts or does what is rare, short from step to step."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from elle_mp.config import ParallelConfig
from elle_mp.parallel.flight_recorder import groups

MARGIN = 10.0
"""Seconds by which torch's own limit is longer: by then the watch has written down where everyone is."""
IDLE, SAVING = "idle", "checkpoint"
"""Descriptions of groups with limits of their own: ranks that wait for a whole stage; disks that ranks wait for."""


class TimeLimits:
    """Sets the time-outs of all process groups of this rank.

    Every rank has to go from one limit to the other at the same place; what was entered before keeps its own.

    Attributes:
        now: the limit that holds, in seconds; 0 before any has been set.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._layout = ParallelConfig()
        self._known = 0

    def use(self, layout: ParallelConfig) -> None:
        """Takes the limits of a layout; the long one holds, for the groups that there are now."""
        self._layout = layout
        self.long()

    def long(self) -> None:
        """From here on the limit of what is rare."""
        self._set(self._layout.first_timeout)

    def short(self) -> None:
        """From here on the limit of a step."""
        self._set(self._layout.step_timeout)

    def _set(self, seconds: float) -> None:
        found = groups()
        if (seconds, len(found)) == (self.now, self._known):
            return
        self.now, self._known = seconds, len(found)
        for group in found:
            if group.group_desc not in (IDLE, SAVING):
                _set_pg_timeout(timedelta(seconds=seconds + MARGIN), group)


def waiting_group() -> dist.ProcessGroup:
    """A group of all ranks for waits of any length. Collective."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=365), group_desc=IDLE)
