"""A file of a checkpoint, hashed while it is written."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

_BUFFER = 8 << 20  # bytes that are hashed and written at a time
_BUFFERS = 4
_ALIGNMENT = 4096  # of what O_DIRECT writes; file systems want 512 or 4096
_SYNC_EVERY = 1 << 30  # what may wait for the disk: it works while the next blocks are computed


class DataFile(AbstractContextManager["DataFile"]):
    """A new file whose bytes are hashed and written by threads while the next ones are computed.

    Written past the page cache (``O_DIRECT``) where the file system can: a checkpoint larger than memory only pushes
    other pages out, and copying it through fresh pages takes longer than the disk does.
    """

    def __init__(self, path: Path) -> None:
        self.size = 0
        self._descriptor, self._direct = _open_new(path)
        self._digest = hashlib.sha256()
        self._unsynced = 0
        self._free = [mmap.mmap(-1, _BUFFER) for _ in range(_BUFFERS)]  # page-aligned, as O_DIRECT wants
        self._filled = 0
        self._busy: deque[tuple[mmap.mmap, Future[None], Future[None]]] = deque()
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-hash")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-write")

    def write(self, data: bytes | memoryview) -> int:
        """Takes all of ``data``; the caller's bytes are his again when this returns."""
        with memoryview(data) as whole, whole.cast("B") as view:
            done = 0
            while done < len(view):
                count = min(len(view) - done, _BUFFER - self._filled)
                self._buffer()[self._filled : self._filled + count] = view[done : done + count]
                done += count
                self._filled += count
                if self._filled == _BUFFER:
                    self._hand_over()
            self.size += len(view)
            return len(view)

    def flush(self) -> None:
        """Nothing: ``torch.save`` calls it after each of thousands of small tensors."""

    def finish(self) -> dict[str, int | str]:
        """Has every byte on the disk; returns the file's size and SHA-256."""
        if self._filled:
            self._hand_over()
        while self._busy:
            self._take_back()
        os.fsync(self._descriptor)
        return {"size": self.size, "sha256": self._digest.hexdigest()}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hasher.shutdown()
        self._writer.shutdown()
        os.close(self._descriptor)

    def _buffer(self) -> mmap.mmap:
        """The buffer that is being filled."""
        if not self._free:
            self._take_back()
        return self._free[-1]

    def _hand_over(self) -> None:
        buffer, count = self._free.pop(), self._filled
        self._filled = 0
        hashing = self._hasher.submit(self._hash, buffer, count)
        writing = self._writer.submit(self._write, buffer, count)
        self._busy.append((buffer, hashing, writing))

    def _take_back(self) -> None:
        buffer, hashing, writing = self._busy.popleft()
        hashing.result()
        writing.result()
        self._free.append(buffer)

    def _hash(self, buffer: mmap.mmap, count: int) -> None:
        with memoryview(buffer) as view:
            self._digest.update(view[:count])

    def _write(self, buffer: mmap.mmap, count: int) -> None:
        if count % _ALIGNMENT:  # the end of the file
            self._write_through_cache()
        with memoryview(buffer) as view:
            done = 0
            while done < count:
                try:
                    done += os.write(self._descriptor, view[done:count])
                except OSError as error:
                    if error.errno != errno.EINVAL or not self._direct:
                        raise
                    self._write_through_cache()  # wants another alignment
        self._unsynced += count
        if not self._direct and self._unsynced > _SYNC_EVERY:
            os.fsync(self._descriptor)
            self._unsynced = 0

    def _write_through_cache(self) -> None:
        if self._direct:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, 0)
        self._direct = False


def _open_new(path: Path) -> tuple[int, bool]:
    """A descriptor of a new file, and whether it is written past the page cache."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666), hasattr(os, "O_DIRECT")
    except OSError as error:
        if error.errno != errno.EINVAL:  # what a file system without O_DIRECT says; it may have made the file
            raise
    path.unlink(missing_ok=True)
    return os.open(path, flags, 0o666), False
