"""Work that one rank does for all, whose failure all ranks hear of."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
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


def check_same(what: str, value: str) -> None:
    """Compares a text over all ranks, by its hash. Collective.

    Raises:
        UserError: on every rank, when they differ; names the ranks that disagree with most.
    """
    if dist.get_world_size() == 1:
        return
    hashes: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hashes, hashlib.sha256(value.encode()).hexdigest())
    if len(set(hashes)) > 1:
        raise UserError(
            f"{what} is not the same on all ranks: {disagreement(hashes, range(len(hashes)))}; "
            "all ranks have to run the same program on the same files and arguments"
        )


def disagreement(values: Sequence[object], ranks: Sequence[int]) -> str:
    """Which ranks have another value than most, or, without a majority, than the first: ``rank 2 differs from ranks 0,
    1 and 3``.
    """
    most, count = Counter(values).most_common(1)[0]
    usual = most if 2 * count > len(values) else values[0]
    odd = [rank for rank, value in zip(ranks, values, strict=True) if value != usual]
    even = [rank for rank, value in zip(ranks, values, strict=True) if value == usual]
    return f"{_named(odd)} {'differs' if len(odd) == 1 else 'differ'} from {_named(even)}"


def _named(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown = [str(rank) for rank in ranks[:8]]
    return f"ranks {', '.join(shown[:-1])} and {shown[-1]}" if len(ranks) <= 8 else f"{len(ranks)} other ranks"
