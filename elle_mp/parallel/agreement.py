"""Work that one rank does for all, whose failure all ranks hear of."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from elle_mp.errors import UserError

T = TypeVar("T")


def on_first_rank(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T | None:
    """Does ``work`` on rank 0 while the others of ``group`` (default: all) wait; rank 0 has to be one of them.

    Returns:
        Its result on rank 0, ``None`` elsewhere.

    Raises:
        UserError: on every rank, what ``work`` raised on rank 0.
    """
    failure: list[str | None] = [None]
    result: T | None = None
    if dist.get_rank() == 0:
        try:
            result = work()
        except UserError as error:
            failure = [str(error)]
    if dist.get_world_size(group) > 1:
        dist.broadcast_object_list(failure, src=0, group=group)
    if failure[0] is not None:
        raise UserError(failure[0])
    return result


def on_first_rank_then_all(work: Callable[[], T]) -> T:
    """Does ``work`` on rank 0, then, what it wrote being there, on the others; returns each rank's own result.

    Raises:
        UserError: on every rank, what ``work`` raised on rank 0.
    """
    result = on_first_rank(work)
    return work() if result is None else result
