"""Steps that all ranks take together, and fail together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from elle_mp.errors import UserError

T = TypeVar("T")


def world_size() -> int:
    """Ranks of the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This rank in the default process group; 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0


def together(step: Callable[[], T], doing: str) -> list[T]:
    """Runs ``step`` on every rank of the default process group; returns every rank's result, on every rank.

    Args:
        step: may raise; its result must be picklable.
        doing: what a failure's message starts with, e.g. ``"cannot write checkpoint step-200"``.

    Raises:
        UserError: ``step`` raised on some rank; on all ranks, with the lowest failing rank's reason.
    """
    result: T | None = None
    failure: str | None = None
    try:
        result = step()
    except (Exception, CheckpointException) as error:
        failure = reason(error)
        if world_size() == 1:
            raise UserError(f"{doing}: {failure}") from error
    if world_size() == 1:
        return [result]  # type: ignore[list-item]
    outcomes: list[tuple[T | None, str | None]] = [(None, None)] * world_size()
    dist.all_gather_object(outcomes, (result, failure))
    for number, (_, text) in enumerate(outcomes):
        if text is not None:
            where = "" if all(other == text for _, other in outcomes) else f"rank {number}: "
            raise UserError(f"{doing}: {where}{text}")
    return [value for value, _ in outcomes]  # type: ignore[misc]


def on_first_rank(step: Callable[[], T], doing: str) -> T:
    """Runs ``step`` on rank 0 alone; returns its result on every rank.

    Raises:
        UserError: ``step`` raised; on all ranks.
    """
    return together(lambda: step() if rank() == 0 else None, doing)[0]  # type: ignore[return-value]


def reason(error: BaseException) -> str:
    """Why something failed, in one line.

    ``torch.distributed.checkpoint`` wraps the errors of all ranks in one, and its writer hides an ``OSError``
    behind an error of its own: the innermost cause is what the user can do something about.
    """
    if isinstance(error, CheckpointException):
        return reason(error.failures[min(error.failures)][0]) if error.failures else "unknown"
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError) and inner.strerror:
            return inner.strerror if inner.filename is None else f"{inner.filename}: {inner.strerror}"
        inner = inner.__cause__ or inner.__context__
    text = str(error).strip().split("\n")[0]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
