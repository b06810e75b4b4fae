"""The .bin/.idx format, against a parser written from Megatron's description of it."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from elle_mp.data.indexed import IndexedDataset, IndexedWriter, bin_path, idx_path, token_dtype
from elle_mp.errors import UserError

DOCUMENTS = [[5, 6, 7], [], [65000, 1], list(range(100))]


def write(prefix: Path, dtype: str = "u2") -> Path:
    """The documents above as a pair."""
    with IndexedWriter(prefix, np.dtype(dtype)) as writer:
        writer.extend(np.array(document, dtype=np.int64) for document in DOCUMENTS)
    return prefix


@pytest.mark.parametrize(("dtype", "code", "size"), [("u2", 8, 2), ("i4", 4, 4), ("i8", 5, 8)])
def test_bytes_are_as_megatron_reads_them(tmp_path: Path, dtype: str, code: int, size: int) -> None:
    prefix = write(tmp_path / "a.b", dtype)
    raw = (tmp_path / "a.b.idx").read_bytes()
    assert raw[:9] == b"MMIDIDX\x00\x00"
    version, found, sequences, bounds = struct.unpack("<QBQQ", raw[9:34])
    assert (version, found, sequences, bounds) == (1, code, 4, 5)
    lengths = struct.unpack("<4i", raw[34:50])
    assert lengths == (3, 0, 2, 100)
    assert struct.unpack("<4q", raw[50:82]) == (0, 3 * size, 3 * size, 5 * size)
    assert struct.unpack("<5q", raw[82:]) == (0, 1, 2, 3, 4)
    flat = [token for document in DOCUMENTS for token in document]
    letter = {2: "H", 4: "i", 8: "q"}[size]
    assert struct.unpack(f"<{len(flat)}{letter}", (tmp_path / "a.b.bin").read_bytes()) == tuple(flat)
    assert [IndexedDataset(prefix).document(i).tolist() for i in range(4)] == DOCUMENTS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.b.bin", "a.b.idx"]


def test_documents_of_several_sequences(tmp_path: Path) -> None:
    """Megatron may keep each sentence of a document as a sequence of its own."""
    np.arange(10, dtype="<i4").tofile(tmp_path / "x.bin")
    lengths, places, bounds = [2, 3, 1, 4], [0, 8, 20, 24], [0, 2, 2, 4]
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, 4, 4)
    (tmp_path / "x.idx").write_bytes(head + struct.pack("<4i4q4q", *lengths, *places, *bounds))
    data = IndexedDataset(tmp_path / "x")
    assert [data.document(i).tolist() for i in range(len(data))] == [[0, 1, 2, 3, 4], [], [5, 6, 7, 8, 9]]
    assert data.lengths.tolist() == [5, 0, 5]


def test_a_part_is_a_view(tmp_path: Path) -> None:
    data = IndexedDataset(write(tmp_path / "a"))
    part = data.part(2, 4)
    assert len(part) == 2 and part.num_tokens == 102
    assert part.document(0).tolist() == [65000, 1] and part.document(1).tolist() == list(range(100))
    assert np.shares_memory(part.tokens, data.tokens)


def test_an_empty_data_set(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", "u2"):
        pass
    data = IndexedDataset(tmp_path / "a")
    assert len(data) == 0 and data.num_tokens == 0


def test_dtype_follows_the_vocabulary() -> None:
    assert token_dtype(65499) == np.uint16
    assert token_dtype(65500) == np.int32


def damage_magic(prefix: Path) -> None:
    idx_path(prefix).write_bytes(b"NOTINDEX0" + idx_path(prefix).read_bytes()[9:])


def damage_length(prefix: Path) -> None:
    idx_path(prefix).write_bytes(idx_path(prefix).read_bytes()[:60])


def damage_header(prefix: Path) -> None:
    idx_path(prefix).write_bytes(idx_path(prefix).read_bytes()[:20])


def damage_version(prefix: Path) -> None:
    raw = bytearray(idx_path(prefix).read_bytes())
    raw[9] = 2
    idx_path(prefix).write_bytes(raw)


def damage_dtype(prefix: Path) -> None:
    raw = bytearray(idx_path(prefix).read_bytes())
    raw[17] = 7
    idx_path(prefix).write_bytes(raw)


def damage_places(prefix: Path) -> None:
    raw = bytearray(idx_path(prefix).read_bytes())
    raw[58] += 2
    idx_path(prefix).write_bytes(raw)


def damage_bounds(prefix: Path) -> None:
    raw = bytearray(idx_path(prefix).read_bytes())
    raw[-8] = 9
    idx_path(prefix).write_bytes(raw)


def damage_tokens(prefix: Path) -> None:
    bin_path(prefix).write_bytes(bin_path(prefix).read_bytes()[:-1])


def remove_index(prefix: Path) -> None:
    idx_path(prefix).unlink()


def remove_tokens(prefix: Path) -> None:
    bin_path(prefix).unlink()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damage_magic, "magic"),
        (damage_length, "truncated"),
        (damage_header, "truncated"),
        (damage_version, "version 2"),
        (damage_dtype, "dtype code 7"),
        (damage_places, "do not follow each other"),
        (damage_bounds, "document bounds"),
        (damage_tokens, "209 bytes, but a.idx describes 210"),
        (remove_index, "a.idx is missing"),
        (remove_tokens, "a.bin is missing"),
    ],
)
def test_a_damaged_pair_is_one_clear_line(tmp_path: Path, damage: object, says: str) -> None:
    prefix = write(tmp_path / "a")
    damage(prefix)  # type: ignore[operator]
    with pytest.raises(UserError, match=says) as caught:
        IndexedDataset(prefix)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_failed_writer_leaves_what_was_there(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RuntimeError), IndexedWriter(prefix, "u2") as writer:
        writer.add(np.arange(5))
        raise RuntimeError
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
