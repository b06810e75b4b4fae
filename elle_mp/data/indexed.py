"""Token files in Megatron's indexed format: ``PREFIX.bin`` holds the tokens, ``PREFIX.idx`` says where
documents begin.

``.idx``, little-endian: magic ``MMIDIDX\\0\\0``, version u64 = 1, dtype code u8, number of sequences u64,
number of document bounds u64, then the sequences' lengths (int32, tokens), their places in ``.bin`` (int64,
bytes) and the document bounds (int64, counted in sequences, from 0). As in
megatron/core/datasets/indexed_dataset.py.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from elle_mp.data.files import beside, file_errors, sync_file
from elle_mp.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest dtype that Megatron would take for ids below ``vocab_size``: uint16 or int32."""
    return DTYPES[8] if vocab_size < 65500 else DTYPES[4]


def bin_path(prefix: Path) -> Path:
    """``PREFIX.bin``."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """``PREFIX.idx``."""
    return prefix.with_name(prefix.name + ".idx")


class IndexedDataset:
    """A tokenised data set, mapped into memory; documents stand in ``.bin`` one after the other.

    Args:
        prefix: path without ``.bin``/``.idx``.

    Raises:
        UserError: a file is missing, of another format, truncated, or not in order.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        lengths, bounds, dtype = read_index(prefix)
        self.starts: NDArray[np.int64] = np.concatenate([[0], np.cumsum(lengths)])[bounds]
        """[documents + 1] where each document begins in the stream, and the end of the last."""
        self.lengths: NDArray[np.int64] = np.diff(self.starts)
        """[documents] tokens of each document."""
        total = int(self.starts[-1])
        path = bin_path(prefix)
        self.tokens: NDArray[Any] = np.memmap(path, dtype, "r", shape=(total,)) if total else np.empty(0, dtype)
        """[tokens] the whole stream."""

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.tokens.size)

    def document(self, index: int) -> NDArray[Any]:
        """The tokens of one document, end mark included; a view."""
        return self.tokens[self.starts[index] : self.starts[index + 1]]

    def part(self, first: int, last: int) -> IndexedDataset:
        """The documents [first, last) as a data set of their own; nothing is copied."""
        part = object.__new__(IndexedDataset)
        part.prefix = self.prefix
        part.lengths = self.lengths[first:last]
        part.starts = self.starts[first : last + 1] - self.starts[first]
        part.tokens = self.tokens[self.starts[first] : self.starts[last]]
        return part


def read_index(prefix: Path) -> tuple[NDArray[np.int64], NDArray[np.int64], np.dtype[Any]]:
    """Reads and checks ``PREFIX.idx``: lengths [sequences], document bounds [documents + 1], dtype of the
    tokens.
    """
    index, data = idx_path(prefix), bin_path(prefix)
    for path in (index, data):
        if not path.is_file():
            raise UserError(f"{path} is missing; a tokenised data set is a pair of .bin and .idx")
    with file_errors("read", index):
        raw = index.read_bytes()
    if not raw.startswith(MAGIC):
        raise UserError(f"{index}: not a Megatron index (its magic is not MMIDIDX); build it with 'elle-mp data build'")
    if len(raw) < HEADER.size:
        raise UserError(f"{index}: truncated: {len(raw)} bytes, its header has {HEADER.size}; build it again")
    _, version, code, sequences, documents = HEADER.unpack_from(raw)
    if version != VERSION or code not in DTYPES or DTYPES[code].kind == "f":
        raise UserError(f"{index}: version {version} with dtype code {code}; known: {VERSION}, integer tokens")
    if len(raw) < HEADER.size + 12 * sequences + 8 * documents:
        raise UserError(f"{index}: truncated: {len(raw)} bytes for {sequences} sequences; build it again")
    lengths = np.frombuffer(raw, "<i4", sequences, HEADER.size).astype(np.int64)
    places = np.frombuffer(raw, "<i8", sequences, HEADER.size + 4 * sequences)
    bounds = np.frombuffer(raw, "<i8", documents, HEADER.size + 12 * sequences).astype(np.int64)
    dtype = DTYPES[code]
    ends = np.cumsum(lengths) * dtype.itemsize
    if (lengths < 0).any() or not np.array_equal(places, ends - lengths * dtype.itemsize):
        raise UserError(f"{index}: its sequences do not follow each other in the .bin; build it again in one piece")
    if documents < 1 or bounds[0] != 0 or bounds[-1] != sequences or (np.diff(bounds) < 0).any():
        raise UserError(f"{index}: its document bounds do not fit its {sequences} sequences; build it again")
    size, wanted = data.stat().st_size, int(ends[-1]) if sequences else 0
    if size != wanted:
        raise UserError(f"{data}: {size} bytes, but {index.name} describes {wanted}; build the pair again")
    return lengths, bounds, dtype


class IndexedWriter:
    """Writes a pair beside its place and puts it there when the ``with`` block ends well; else nothing is
    left.

    Args:
        prefix: path without ``.bin``/``.idx``; its folder is made.
        dtype: of the tokens, one of :data:`DTYPES`.

    Raises:
        UserError: the place cannot be written to.
    """

    def __init__(self, prefix: Path, dtype: DTypeLike) -> None:
        self.prefix = prefix
        self.dtype = np.dtype(dtype)
        self.lengths: list[int] = []
        """Tokens of each document so far."""
        self._data = beside(bin_path(prefix))
        with file_errors("write", bin_path(prefix)):
            prefix.parent.mkdir(parents=True, exist_ok=True)
            self._handle = self._data.open("wb", buffering=1 << 20)

    def add(self, tokens: NDArray[Any]) -> None:
        """Appends one document [n]."""
        if tokens.size > 2**31 - 1:
            raise UserError(f"a document of {tokens.size} tokens is too long for the .idx format; cut it in two")
        with file_errors("write", bin_path(self.prefix)):
            self._handle.write(np.ascontiguousarray(tokens, dtype=self.dtype).data)
        self.lengths.append(int(tokens.size))

    def extend(self, documents: Iterable[NDArray[Any]]) -> None:
        """Appends several documents."""
        for document in documents:
            self.add(document)

    def index_bytes(self) -> bytes:
        """The content of ``.idx``."""
        code = next(code for code, dtype in DTYPES.items() if dtype == self.dtype)
        lengths = np.array(self.lengths, dtype="<i4")
        ends = np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
        places = (ends - lengths.astype(np.int64) * self.dtype.itemsize).astype("<i8")
        bounds = np.arange(len(lengths) + 1, dtype="<i8")
        header = HEADER.pack(MAGIC, VERSION, code, len(lengths), len(bounds))
        return header + lengths.tobytes() + places.tobytes() + bounds.tobytes()

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        index = beside(idx_path(self.prefix))
        try:
            with file_errors("write", bin_path(self.prefix)):
                self._handle.close()
                if kind is None:
                    sync_file(self._data)
                    index.write_bytes(self.index_bytes())
                    sync_file(index)
                    os.replace(self._data, bin_path(self.prefix))
                    os.replace(index, idx_path(self.prefix))
        finally:
            self._data.unlink(missing_ok=True)
            index.unlink(missing_ok=True)
