"""Writes tensors that are computed block by block as an ordinary ``torch.distributed.checkpoint``.

The saver of ``torch.distributed.checkpoint`` asks a planner for its data lazily, but keeps the last chunk of every
tensor until the file is complete, so its memory grows with the model. Here the same file is written with one block
at a time: each chunk is a ``torch.save`` at (file, offset, length), and ``.metadata`` says which chunk is where.
"""

from __future__ import annotations

import hashlib
import os
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

_JOIN = 1 << 20  # pieces up to this size are joined before they are written and hashed
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
    """A new file that is hashed while it is written, and reaches the disk while it is written.

    ``torch.save`` hands a tensor's bytes to :meth:`write` in one piece, without a copy.
    """

    def __init__(self, path: Path) -> None:
        self.size = 0
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._digest = hashlib.sha256()
        self._small = bytearray()
        self._unsynced = 0
        self._syncing: Future[None] | None = None
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="checkpoint")

    def write(self, data: bytes | memoryview) -> int:
        """Takes all of ``data``; what is small is held back until there is more."""
        if len(data) > _JOIN:
            self._write_small()
            self._put(data)
        else:
            self._small += data
            if len(self._small) > _JOIN:
                self._write_small()
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Nothing: ``torch.save`` calls it after each of thousands of small tensors."""

    def finish(self) -> dict[str, int | str]:
        """Has every byte on the disk; returns the file's size and SHA-256."""
        self._write_small()
        self._start_sync()
        self._end_sync()
        return {"size": self.size, "sha256": self._digest.hexdigest()}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        os.close(self._descriptor)

    def _write_small(self) -> None:
        self._put(self._small)
        self._small = bytearray()

    def _put(self, data: bytes | bytearray | memoryview) -> None:
        hashing = self._pool.submit(self._digest.update, data)
        try:
            with memoryview(data) as view:
                done = 0
                while done < len(view):
                    done += os.write(self._descriptor, view[done:])
        finally:
            hashing.result()  # the caller's bytes are his again when this returns
        self._unsynced += len(data)
        if self._unsynced > _SYNC_EVERY:
            self._start_sync()

    def _start_sync(self) -> None:
        self._end_sync()
        self._unsynced = 0
        self._syncing = self._pool.submit(os.fsync, self._descriptor)

    def _end_sync(self) -> None:
        if self._syncing is not None:
            self._syncing.result()
        self._syncing = None
