"""Writes tensors that are computed block by block as an ordinary ``torch.distributed.checkpoint``.

The saver of ``torch.distributed.checkpoint`` asks a planner for its data lazily, but keeps the last chunk of every
tensor until the file is complete, so its memory grows with the model. Here the same file is written with one block
at a time: each chunk is a ``torch.save`` at (file, offset, length), and ``.metadata`` says which chunk is where.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import IO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo  # what .metadata refers to
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from elle_mp.checkpoint.manifest import FileEntries
from elle_mp.ops.random import Bounds

Declared = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Global shape and dtype by name."""

_BUFFER = 8 << 20  # bytes that are hashed and written at a time
_BUFFERS = 4
_ALIGNMENT = 4096  # of what O_DIRECT writes; file systems want 512 or 4096
_SYNC_EVERY = 1 << 30  # what may wait for the disk: it works while the next blocks are computed
_BLOCK_COST = 64 << 10  # bytes that take as long to write as a block takes to start


def blocks(shape: Sequence[int], itemsize: int, block_bytes: int) -> Iterator[Bounds]:
    """Cuts a tensor into blocks of at most ``block_bytes`` (but at least one value), in the order of its bytes.

    Whole rows (dim 0) where a row fits, else parts of one row. A scalar is ``()``; an empty tensor is one block.
    """
    if prod(shape) * itemsize <= block_bytes or not shape:
        yield tuple((0, size) for size in shape)
        return
    row_bytes = prod(shape[1:]) * itemsize
    if row_bytes > block_bytes and len(shape) > 1:
        for row in range(shape[0]):
            for rest in blocks(shape[1:], itemsize, block_bytes):
                yield ((row, row + 1), *rest)
        return
    rows = max(1, block_bytes // row_bytes)
    for start in range(0, shape[0], rows):
        yield ((start, min(start + rows, shape[0])), *((0, size) for size in shape[1:]))


@dataclass(frozen=True)
class Share:
    """What one rank wrote: its chunks, and its files with their hashes."""

    results: list[WriteResult]
    files: FileEntries


def write_share(
    folder: Path,
    tensors: Declared,
    produce: Callable[[str, Bounds], Tensor],
    block_bytes: int,
    rank: int,
    world_size: int,
    progress: Callable[[int], None] | None,
) -> Share:
    """Writes the blocks of ``rank``, synced, into one file of ``folder``. Not collective.

    Raises:
        ValueError: ``produce`` returned something of another shape or dtype than declared.
        OSError: the file cannot be written (perhaps as the cause of torch's ``RuntimeError``).
    """
    file = f"__{rank}_0.distcp"
    results = []
    with _DataFile(folder / file) as output:
        for name, bounds in _share(tensors, block_bytes, rank, world_size):
            block = _produce(produce, name, bounds, tensors[name][1])
            start = output.size
            torch.save(block, cast(IO[bytes], output))
            index = MetadataIndex(name, torch.Size(low for low, _ in bounds))
            length = output.size - start
            results.append(WriteResult(index, length, _StorageInfo(file, start, length)))
            if progress is not None:
                progress(block.nbytes)
            del block
        return Share(results, {file: output.finish()})


def write_metadata(folder: Path, tensors: Declared, block_bytes: int, results: list[list[WriteResult]]) -> None:
    """Writes ``.metadata``, synced: which chunk of which tensor is where.

    Args:
        results: of all ranks; together every block of every tensor.
    """
    described = {
        name: TensorStorageMetadata(
            TensorProperties(dtype=dtype),
            torch.Size(shape),
            [
                ChunkStorageMetadata(torch.Size(low for low, _ in block), torch.Size(high - low for low, high in block))
                for block in blocks(shape, dtype.itemsize, block_bytes)
            ],
        )
        for name, (shape, dtype) in tensors.items()
    }
    # planner_data says how the names nest in a state dict: not at all, each is a key of its own.
    metadata = Metadata(dict(described), planner_data={name: (name,) for name in tensors})
    writer = FileSystemWriter(folder)
    writer.set_up_storage_writer(True)
    writer.finish(metadata, results)


def _share(tensors: Declared, block_bytes: int, rank: int, world_size: int) -> Iterator[tuple[str, Bounds]]:
    """The blocks of ``rank``: a run of all blocks in order (so that its reads are one run as well)."""
    every = list(_all_blocks(tensors, block_bytes))
    total = sum(cost for _, _, cost in every)
    before = 0
    for name, bounds, cost in every:
        if (2 * before + cost) * world_size // (2 * total) == rank:  # its middle lies in this rank's part
            yield name, bounds
        before += cost


def _all_blocks(tensors: Declared, block_bytes: int) -> Iterator[tuple[str, Bounds, int]]:
    for name, (shape, dtype) in tensors.items():
        for bounds in blocks(shape, dtype.itemsize, block_bytes):
            yield name, bounds, _BLOCK_COST + _numel(bounds) * dtype.itemsize


def _numel(bounds: Bounds) -> int:
    return prod(high - low for low, high in bounds)


def _produce(produce: Callable[[str, Bounds], Tensor], name: str, bounds: Bounds, dtype: torch.dtype) -> Tensor:
    """The block as ``torch.save`` should see it: plain, on the CPU, contiguous, with no bytes around it."""
    block = produce(name, bounds).detach()
    shape = tuple(high - low for low, high in bounds)
    if tuple(block.shape) != shape or block.dtype != dtype:
        found = f"{block.dtype} {list(block.shape)}"
        raise ValueError(f"the block {bounds} of {name} was made as {found}, not {dtype} {list(shape)}")
    block = block.cpu().contiguous()
    return block if block.untyped_storage().nbytes() == block.nbytes else block.clone()


class _DataFile(AbstractContextManager["_DataFile"]):
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
