"""Writes tensors that are computed block by block as an ordinary ``torch.distributed.checkpoint``.

The saver of ``torch.distributed.checkpoint`` asks a planner for its data lazily, but keeps the last chunk of every
tensor until the file is complete, so its memory grows with the model. Here the same file is written with one block
at a time: each chunk is a ``torch.save`` at (file, offset, length), and ``.metadata`` says which chunk is where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
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

from elle_mp.checkpoint.data_file import DataFile
from elle_mp.checkpoint.manifest import FileEntries
from elle_mp.checkpoint.shards import Piece, Place
from elle_mp.ops.random import Bounds

Declared = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Global shape and dtype by name."""

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

    def made() -> Iterator[Piece]:
        for name, bounds in _share(tensors, block_bytes, rank, world_size):
            shape, dtype = tensors[name]
            block = _produce(produce, name, bounds, dtype)
            size = block.nbytes
            piece = [Piece(name, shape, tuple(low for low, _ in bounds), block)]
            del block
            yield piece.pop()
            if progress is not None:
                progress(size)

    return write_pieces(folder, made(), rank)


def write_pieces(folder: Path, pieces: Iterable[Piece], rank: int) -> Share:
    """Writes blocks, synced, into one file of ``folder`` that is named after ``rank``. Not collective.

    Raises:
        OSError: the file cannot be written (perhaps as the cause of torch's ``RuntimeError``).
    """
    file = f"__{rank}_0.distcp"
    results = []
    with DataFile(folder / file) as output:
        for piece in pieces:
            start = output.size
            torch.save(_alone(piece.values), cast(IO[bytes], output))
            index = MetadataIndex(piece.name, torch.Size(piece.offsets))
            length = output.size - start
            results.append(WriteResult(index, length, _StorageInfo(file, start, length)))
            del piece  # before the next one is made
        return Share(results, {file: output.finish()})


def places_of(tensors: Declared, block_bytes: int) -> dict[str, list[Place]]:
    """Every block that :func:`write_share` writes, by tensor."""
    return {
        name: [
            Place(name, shape, dtype, tuple(low for low, _ in block), tuple(high - low for low, high in block))
            for block in blocks(shape, dtype.itemsize, block_bytes)
        ]
        for name, (shape, dtype) in tensors.items()
    }


def write_metadata(folder: Path, tensors: Mapping[str, Sequence[Place]], results: Sequence[list[WriteResult]]) -> None:
    """Writes ``.metadata``, synced: which chunk of which tensor is where.

    Args:
        tensors: every block of every tensor, by its name.
        results: of all ranks; together every block.
    """
    described = {
        name: TensorStorageMetadata(
            TensorProperties(dtype=places[0].dtype),
            torch.Size(places[0].shape),
            [ChunkStorageMetadata(torch.Size(place.offsets), torch.Size(place.sizes)) for place in places],
        )
        for name, places in tensors.items()
    }
    # planner_data says how the names nest in a state dict: not at all, each is a key of its own.
    metadata = Metadata(dict(described), planner_data={name: (name,) for name in tensors})
    writer = FileSystemWriter(folder)
    writer.set_up_storage_writer(True)
    writer.finish(metadata, list(results))


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
    """The block, checked against its declaration."""
    block = produce(name, bounds).detach()
    shape = tuple(high - low for low, high in bounds)
    if tuple(block.shape) != shape or block.dtype != dtype:
        found = f"{block.dtype} {list(block.shape)}"
        raise ValueError(f"the block {bounds} of {name} was made as {found}, not {dtype} {list(shape)}")
    return block


def _alone(values: Tensor) -> Tensor:
    """The block as ``torch.save`` should see it: plain, on the CPU, contiguous, with no bytes around it."""
    values = values.cpu().contiguous()
    if values.untyped_storage().nbytes() == values.nbytes:
        return values
    if not values.numel():
        return values.clone()
    return torch.frombuffer(values.view(-1).view(torch.uint8).numpy(), dtype=values.dtype).view(values.shape)
