"""Reads blocks of the tensors of a checkpoint, in memory bounded by the block, whatever layout wrote it.

A chunk is a ``torch.save`` zip at (file, offset, length); its storage lies in the zip uncompressed. So the bytes of
any row are at a known place of the file, and a block is read from there straight into the result.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import sys
import zipfile
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from elle_mp.checkpoint.manifest import DamagedError, check_hash, check_sizes
from elle_mp.checkpoint.stream_writer import blocks
from elle_mp.data.files import file_errors
from elle_mp.errors import UserError
from elle_mp.ops.random import Bounds

_SCRATCH = 4 << 20  # bytes of the rows of which only some columns are wanted, or that go into wider rows
_SEEK = 16 << 10  # bytes of a row that are worth a read of their own: what lies between them is not read
_STEP = 16 << 20  # bytes that are read at a time to be converted or sent to a device
_SMALL = 64 << 10  # a chunk up to this size is fetched at once to look at its zip
_LOCAL_HEADER = 30  # bytes of a zip's local header before the name; the two lengths are its last four

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass
class _Chunk:
    """A stored part of a tensor: where it lies in the tensor, and its zip's place in a file.

    Attributes:
        data: where in the file the values begin, row by row; -1 if they are not stored so; ``None``: not looked at.
    """

    name: str
    dtype: torch.dtype
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    path: Path
    start: int
    length: int
    data: int | None = None


@dataclass
class _Chunks:
    """The chunks of one tensor by their first row, to find those of some rows among many."""

    chunks: list[_Chunk]
    starts: list[int] = field(init=False)
    reach: list[int] = field(init=False)  # the end of the furthest row up to each chunk

    def __post_init__(self) -> None:
        self.chunks.sort(key=lambda chunk: chunk.offsets)
        self.starts = [sum(chunk.offsets[:1]) for chunk in self.chunks]
        ends = [start + prod(chunk.sizes[:1]) for start, chunk in zip(self.starts, self.chunks, strict=True)]
        self.reach = list(accumulate(ends, max))

    def near(self, bounds: Bounds) -> Sequence[_Chunk]:
        """The chunks that may hold some of the rows of ``bounds``."""
        if not bounds:
            return self.chunks
        return self.chunks[bisect_right(self.reach, bounds[0][0]) : bisect_left(self.starts, bounds[0][1])]


class StoredTensors:
    """The tensors of one complete checkpoint, to be read block by block. Not collective.

    Attributes:
        meta: what the checkpoint was saved with.
        tensors: global shape and dtype by name.
    """

    def __init__(self, folder: Path, check_hashes: bool = False) -> None:
        """Reads what the checkpoint holds, and compares the sizes of its files.

        Args:
            folder: of the checkpoint, ``<run>/checkpoints/<name>``.
            check_hashes: reads every file and compares its SHA-256 as well.

        Raises:
            UserError: there is no checkpoint, or a file of it is missing or damaged; names the file.
        """
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"no checkpoint at {self.folder}: not a folder")
        manifest = check_sizes(self.folder)
        for file in sorted(manifest.files):
            if check_hashes or file == ".metadata":  # small, and unpickled below
                check_hash(self.folder, manifest, file)
        self.meta = manifest.meta
        metadata = FileSystemReader(self.folder).read_metadata()
        self._chunks: dict[str, _Chunks] = {}
        tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name, item in metadata.state_dict_metadata.items():
            if isinstance(item, TensorStorageMetadata):
                tensors[name] = (tuple(item.size), item.properties.dtype)
                self._chunks[name] = _Chunks(self._stored(name, item, metadata.storage_data))
        self.tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]] = tensors

    def read(self, name: str, bounds: Bounds) -> Tensor:
        """The block of a tensor within half-open global bounds per dimension (``()`` for a scalar), on the CPU.

        Only the rows concerned are read from the file. Besides the result at most 4 MiB (or one row of the last
        dimension, if that is more) are held, but for a chunk whose values are not stored row by row: it is read whole.

        Raises:
            UserError: there is no such tensor, or a file is cut short, damaged or cannot be read; names the file.
            ValueError: the bounds do not lie in the tensor.
        """
        self._check_bounds(name, bounds)
        result = torch.empty([high - low for low, high in bounds], dtype=self.tensors[name][1])
        self._fill(name, bounds, result)
        return result

    def read_into(self, name: str, bounds: Bounds, target: Tensor) -> None:
        """:meth:`read` into memory that is there, of any strides, device and kind of number.

        Where the bytes cannot go straight into the target, 16 MiB of them (or one value) are held at a time.
        """
        self._check_bounds(name, bounds)
        dtype = self.tensors[name][1]
        if target.device.type == "cpu" and target.dtype == dtype:
            self._fill(name, bounds, target)
            return
        # One buffer for all: freed blocks leave holes between them that no later one fits.
        buffer = torch.empty(min(target.numel(), max(1, _STEP // dtype.itemsize)), dtype=dtype)
        for block in blocks(target.shape, dtype.itemsize, _STEP):
            part = tuple((start + low, start + high) for (start, _), (low, high) in zip(bounds, block, strict=True))
            sizes = [high - low for low, high in block]
            values = buffer[: prod(sizes)].view(sizes)
            self._fill(name, part, values)
            target[tuple(slice(low, high) for low, high in block)].copy_(values)

    def _check_bounds(self, name: str, bounds: Bounds) -> None:
        if name not in self.tensors:
            raise UserError(f"{self.folder} holds no tensor {name}")
        shape, _ = self.tensors[name]
        if len(bounds) != len(shape) or any(
            not 0 <= low <= high <= size for (low, high), size in zip(bounds, shape, strict=False)
        ):
            raise ValueError(f"no block {bounds} in {name} {list(shape)}")

    def _fill(self, name: str, bounds: Bounds, target: Tensor) -> None:
        missing = target.numel()
        for chunk in self._chunks[name].near(bounds) if missing else ():
            both = tuple(
                (max(low, offset), min(high, offset + size))
                for (low, high), offset, size in zip(bounds, chunk.offsets, chunk.sizes, strict=True)
            )
            if any(low >= high for low, high in both):
                continue
            place = tuple(
                slice(low - start, high - start) for (low, high), (start, _) in zip(both, bounds, strict=True)
            )
            part = tuple((low - start, high - start) for (low, high), start in zip(both, chunk.offsets, strict=True))
            _read_chunk(chunk, part, target[place])
            missing -= prod(high - low for low, high in both)
        if missing > 0:
            raise DamagedError(f"{self.folder} does not hold all of tensor {name}")

    def _stored(self, name: str, item: TensorStorageMetadata, places: Mapping[MetadataIndex, Any]) -> list[_Chunk]:
        chunks = []
        for chunk in item.chunks:
            place = places[MetadataIndex(name, chunk.offsets)]
            path = self.folder / place.relative_path
            sizes = (tuple(chunk.offsets), tuple(chunk.sizes))
            chunks.append(_Chunk(name, item.properties.dtype, *sizes, path, place.offset, place.length))
        return chunks


class _File(AbstractContextManager["_File"]):
    """A file that is read at given places."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def fill(self, target: memoryview, start: int) -> None:
        """Reads ``len(target)`` bytes at ``start``."""
        done = 0
        while done < len(target):
            count = os.preadv(self._descriptor, [target[done:]], start + done)
            if count == 0:
                raise DamagedError(f"{self.path} is cut short: it ends before byte {start + len(target)}")
            done += count

    def window(self, start: int, length: int) -> IO[bytes]:
        """A part of the file as a file; fetched at once if it is small."""
        if length > _SMALL:
            return io.BufferedReader(_Window(self, start, length))
        data = bytearray(length)
        self.fill(memoryview(data), start)
        return io.BytesIO(data)


class _Window(io.RawIOBase):
    def __init__(self, file: _File, start: int, length: int) -> None:
        self._file, self._start, self._length, self._position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._length)[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._length - self._position))
        self._file.fill(memoryview(buffer)[:count], self._start + self._position)
        self._position += count
        return count


def _read_chunk(chunk: _Chunk, part: Bounds, target: Tensor) -> None:
    """Fills ``target`` with ``part`` of a chunk."""
    with file_errors("read", chunk.path), _File(chunk.path) as file:
        try:
            if chunk.data is None:
                chunk.data = _find_data(file, chunk)
            if chunk.data >= 0:
                sizes, rows = chunk.sizes or (1,), part or ((0, 1),)
                _read_rows(file, chunk.data, sizes, rows, target if chunk.sizes else target.view(1))
                return
            with file.window(chunk.start, chunk.length) as window:
                whole: Tensor = torch.load(window, map_location="cpu", weights_only=True)
        except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, LookupError, ValueError, EOFError) as error:
            raise DamagedError(f"{chunk.path} is damaged at byte {chunk.start} (tensor {chunk.name})") from error
    target.copy_(whole[tuple(slice(low, high) for low, high in part)])


def _read_rows(file: _File, start: int, sizes: tuple[int, ...], part: Bounds, target: Tensor) -> None:
    """Fills ``target`` with ``part`` of a row-major tensor of ``sizes`` that begins at byte ``start``."""
    (low, high), rest = part[0], part[1:]
    row_bytes = prod(sizes[1:]) * target.element_size()
    whole_rows = rest == tuple((0, size) for size in sizes[1:])
    if whole_rows and target.is_contiguous():
        file.fill(_bytes_of(target), start + low * row_bytes)
        return
    wanted_bytes = prod(last - first for first, last in rest) * target.element_size()
    if rest and (row_bytes > _SCRATCH or wanted_bytes >= _SEEK):
        for row in range(low, high):
            _read_rows(file, start + row * row_bytes, sizes[1:], rest, target[row - low])
        return
    step = max(1, _SCRATCH // row_bytes)
    scratch = torch.empty((min(step, high - low), *sizes[1:]), dtype=target.dtype)
    columns = tuple(slice(first, last) for first, last in rest)
    for row in range(low, high, step):
        rows = scratch[: min(step, high - row)]
        file.fill(_bytes_of(rows), start + row * row_bytes)
        target[row - low : row - low + len(rows)].copy_(rows[(slice(None), *columns)])


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    key: str
    numel: int


@dataclass(frozen=True)
class _Rebuilt:
    """The arguments with which ``torch.load`` would make the tensor."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Unpickler(pickle.Unpickler):
    """Reads how one plain tensor is stored, and nothing else."""

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, key, _, numel = pid
        return _Storage(dtype, key, numel)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            rebuild: Callable[..., _Rebuilt] = lambda *args: _Rebuilt(*args[:4])  # noqa: E731
            return rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"not part of a plain tensor: {module}.{name}")


def _find_data(file: _File, chunk: _Chunk) -> int:
    """Where in the file the chunk's values begin, if they are stored row by row; else -1."""
    window = file.window(chunk.start, chunk.length)
    with window, zipfile.ZipFile(window) as archive:
        names = archive.namelist()
        root = next(name for name in names if name.endswith("data.pkl")).removesuffix("data.pkl")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder").decode() != sys.byteorder:
            return -1
        try:
            tensor = _Unpickler(io.BytesIO(archive.read(f"{root}data.pkl"))).load()
        except pickle.UnpicklingError:
            return -1  # a newer dtype or a subclass
        if not isinstance(tensor, _Rebuilt) or tensor.storage.dtype != chunk.dtype:
            return -1
        if tuple(tensor.size) != chunk.sizes or not _is_row_major(tensor):
            return -1
        entry = archive.getinfo(f"{root}data/{tensor.storage.key}")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != tensor.storage.numel * chunk.dtype.itemsize:
            return -1
        window.seek(entry.header_offset)
        lengths = struct.unpack("<HH", window.read(_LOCAL_HEADER)[-4:])
    return chunk.start + entry.header_offset + _LOCAL_HEADER + sum(lengths) + tensor.offset * chunk.dtype.itemsize


def _is_row_major(tensor: _Rebuilt) -> bool:
    expected = 1
    for size, stride in zip(reversed(tensor.size), reversed(tensor.stride), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return tensor.offset + prod(tensor.size) <= tensor.storage.numel
