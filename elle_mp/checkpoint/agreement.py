"""Steps that all ranks of a group take together, and fail together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from elle_mp.errors import UserError

T = TypeVar("T")

_PATIENCE = timedelta(hours=1)  # ranks wait for the slowest one's disk


@dataclass(frozen=True)
class Team:
    """The ranks of a process group.

    Attributes:
        group: ``None`` for the default group; without one, this process is alone.
    """

    group: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        """How many they are."""
        return dist.get_world_size(self.group) if dist.is_initialized() else 1

    @property
    def rank(self) -> int:
        """This process's number among them; negative if it is none of them."""
        return dist.get_rank(self.group) if dist.is_initialized() else 0

    def together(self, step: Callable[[], T], doing: str) -> list[T]:
        """Runs ``step`` on every rank; returns every rank's result, on every rank.

        Args:
            step: may raise; its result must be picklable.
            doing: what a failure's message starts with, e.g. ``"cannot write checkpoint step-200"``.

        Raises:
            UserError: ``step`` raised on some rank; on all ranks, with the lowest failing rank's reason.
        """
        result, failure = self._attempt(step, doing)
        if self.size == 1:
            return [result]
        outcomes = self._everyones((result, failure))
        self._raise_any([text for _, text in outcomes], doing)
        return [value for value, _ in outcomes]

    def to_first(self, step: Callable[[], T], doing: str) -> list[T]:
        """:meth:`together` with results that only rank 0 gets, because all of them are large; elsewhere none."""
        result, failure = self._attempt(step, doing)
        if self.size == 1:
            return [result]
        self._raise_any(self._everyones(failure), doing)
        results: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(result, results, group=self.group, group_dst=0)
        return results or []

    def on_first(self, step: Callable[[], T], doing: str) -> T:
        """Runs ``step`` on rank 0 alone; returns its result on every rank.

        Raises:
            UserError: ``step`` raised; on all ranks.
        """
        return self.together(lambda: step() if self.rank == 0 else None, doing)[0]  # type: ignore[return-value]

    def from_first(self, step: Callable[[], Sequence[T]], doing: str) -> T:
        """Runs ``step`` on rank 0 alone; returns to every rank its own item of the result.

        Raises:
            UserError: ``step`` raised; on all ranks.
        """
        items: list[Any] = []
        self.on_first(lambda: items.extend(step()), doing)
        if self.size == 1:
            return items[0]
        mine: list[Any] = [None]
        dist.scatter_object_list(mine, items or None, group=self.group, group_src=0)
        return mine[0]

    def _attempt(self, step: Callable[[], T], doing: str) -> tuple[Any, str | None]:
        if self.rank < 0:
            raise RuntimeError("this rank is not of the group that works on these checkpoints")
        try:
            return step(), None
        except Exception as error:
            if self.size == 1:
                raise UserError(f"{doing}: {reason(error)}") from error
            return None, reason(error)

    def _everyones(self, item: T) -> list[T]:
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item, group=self.group)
        return items

    def _raise_any(self, failures: list[str | None], doing: str) -> None:
        for number, text in enumerate(failures):
            if text is not None:
                where = "" if all(other == text for other in failures) else f"rank {number}: "
                raise UserError(f"{doing}: {where}{text}")


def background_group(ranks: Sequence[int] | None = None) -> dist.ProcessGroup | None:
    """A gloo group for saves in the background alone: two threads must never share a group.

    Every rank of the default group must call it, those that are not in ``ranks`` as well, and all in the same order
    as other calls that make groups.

    Args:
        ranks: of the default group; all of them by default.

    Returns:
        The group; ``None`` where one rank is alone and needs none.
    """
    alone = not dist.is_initialized() or dist.get_world_size() == 1
    return None if alone else dist.new_group(ranks, timeout=_PATIENCE, backend="gloo", group_desc="checkpoint")


def reason(error: BaseException) -> str:
    """Why something failed, in one line.

    ``torch.save`` hides an ``OSError`` behind an error of its own: the innermost cause is what the user can do
    something about.
    """
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError) and inner.strerror:
            return inner.strerror if inner.filename is None else f"{inner.filename}: {inner.strerror}"
        inner = inner.__cause__ or inner.__context__
    text = str(error).strip().split("\n")[0]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
