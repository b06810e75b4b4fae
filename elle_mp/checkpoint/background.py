"""One piece of work at a time on a thread, and the memory that it works from."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from threading import Thread

import torch

from elle_mp.checkpoint.shards import Piece, Place
from elle_mp.errors import UserError

_ALIGNMENT = 64  # bytes; of each block in the staging memory


class Background:
    """A thread that does one work at a time; what goes wrong there is raised here."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: Thread | None = None
        self._failure: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether the work goes on."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether the work has ended with an error that :meth:`wait` will raise."""
        return self._failure is not None

    def start(self, work: Callable[[], object]) -> None:
        """Waits for the work before, and starts this one.

        Raises:
            BaseException: what the work before raised.
        """
        self.wait()

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._failure = error

        # Not a daemon: a process that ends lets it finish, where the interpreter would pull memory from under it.
        self._thread = Thread(target=run, name=self._name)
        self._thread.start()

    def wait(self) -> None:
        """Returns when no work goes on.

        Raises:
            BaseException: what the work raised; once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if isinstance(failure, UserError):
            raise UserError(str(failure)) from failure
        if failure is not None:
            raise failure


class Staging:
    """Host memory for copies of blocks, kept from one save to the next: fresh pages take ten times as long as copying.

    Page-locked if the blocks come from a GPU.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._blocks: list[Piece] = []
        self._places: list[Place] = []

    def reserve(self, size: int, pinned: bool) -> None:
        """Has at least ``size`` bytes, every page of them touched."""
        if self._memory.nbytes < size or (pinned and not self._memory.is_pinned()):
            self._blocks, self._places = [], []
            self._memory = torch.empty(0, dtype=torch.uint8)  # the old memory first: both may not fit
            self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
            if not pinned:
                # Not fill_: it would start a thread pool of its own beside the training's. This lets go of the GIL.
                ctypes.memset(self._memory.data_ptr(), 0, size)

    @torch.no_grad()
    def hold(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Copies of blocks; they live until the next call."""
        self.reserve(staging_size(pieces), come_from_gpu(pieces))
        places = [piece.place for piece in pieces]
        if self._places != places:
            self._blocks, self._places = self._cut(pieces), places
        sources = [piece.values for piece in pieces]
        if sources:
            torch._foreach_copy_([piece.values for piece in self._blocks], sources, non_blocking=True)
        if come_from_gpu(pieces):
            torch.cuda.synchronize()
        return self._blocks

    def _cut(self, pieces: Sequence[Piece]) -> list[Piece]:
        memory = self._memory.numpy()
        cut, start = [], 0
        for piece in pieces:
            values, size = piece.values, piece.values.nbytes
            # A tensor whose storage is these bytes alone: torch.save writes whole storages.
            copy = (
                torch.frombuffer(memory[start : start + size], dtype=values.dtype).view(values.shape)
                if size
                else torch.empty_like(values, device="cpu")
            )
            cut.append(Piece(piece.name, piece.shape, piece.offsets, copy))
            start += _padded(size)
        return cut


def staging_size(pieces: Sequence[Piece]) -> int:
    """Bytes that :class:`Staging` needs for copies of blocks."""
    return sum(_padded(piece.values.nbytes) for piece in pieces)


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def come_from_gpu(pieces: Sequence[Piece]) -> bool:
    """Whether copying them can be left to the device."""
    return any(piece.values.is_cuda for piece in pieces)
