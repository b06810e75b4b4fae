"""Ranks that a stage has no use for wait until it ends (``parallel.idle_ranks``)."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from elle_mp.parallel.mesh import Grid
from elle_mp.parallel.time_limits import waiting_group
from elle_mp.stream.state import RunState


class WaitingRoom:
    """Where all ranks of the job meet between two stages. Made by all of them, before there is a layout.

    A stage may take weeks; a rank that fails meanwhile ends the job, and so the waiting.
    """

    def __init__(self) -> None:
        several = dist.get_world_size() > 1
        self.group = waiting_group() if several else None

    def meet(self, grid: Grid, state: RunState, stopped: bool) -> tuple[RunState, bool]:
        """What the ranks with a place have come to, on every rank; returns at once where all ranks have one."""
        if grid.everyone is None or self.group is None:
            return state, stopped
        shared: list[Any] = [state.to_json(), stopped]
        dist.broadcast_object_list(shared, src=0, group=self.group)
        return (state if grid.active else RunState.from_json(shared[0])), bool(shared[1])
