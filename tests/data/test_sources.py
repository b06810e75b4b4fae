"""Documents from files and folders; splits; bad input in one clear line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from elle_mp.data.sources import check_source, read_documents, source_fingerprint
from elle_mp.errors import UserError


def write_jsonl(path: Path, texts: list[str]) -> str:
    """One {"text": ...} a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def both(data: str) -> tuple[list[str], list[str]]:
    """Train and valid documents."""
    return list(read_documents(data, "train")), list(read_documents(data, "valid"))


def test_jsonl(tmp_path: Path) -> None:
    texts = ["one\ntwo\r\n", "  tabs\tand blanks  ", "snow \u2603 and \U0001f600", "\x00 nul", "x"]
    data = write_jsonl(tmp_path / "a.jsonl", [*texts, ""])
    assert list(read_documents(data, "all")) == texts
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": "b", "more": 1}')
    assert list(read_documents(str(tmp_path / "b.jsonl"), "all")) == ["a", "b"]


def test_a_broken_surrogate_becomes_the_replacement_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b \\ud83d\\ude00"}\n')
    (text,) = read_documents(str(tmp_path / "a.jsonl"), "all")
    assert text == "a\ufffdb \U0001f600"


def test_text_files(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n\n  first line\nsecond\n \t\n\nnext\r\nline\r\n\r\nlast")
    assert list(read_documents(str(path), "all")) == ["  first line\nsecond", "next\r\nline", "last"]
    path.write_text("all\nin one\n")
    assert list(read_documents(str(path), "all")) == ["all\nin one"]


def test_folders(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a" / "train.jsonl", ["t1", "t2"])
    (tmp_path / "a" / "valid.txt").write_text("v1\n\nv2\n")
    assert both(str(tmp_path / "a")) == (["t1", "t2"], ["v1", "v2"])
    assert list(read_documents(str(tmp_path / "a"), "all")) == ["t1", "t2", "v1", "v2"]
    write_jsonl(tmp_path / "b" / "train" / "2.jsonl", ["t2"])
    write_jsonl(tmp_path / "b" / "train" / "deep" / "3.jsonl", ["t3"])
    (tmp_path / "b" / "train" / "1.txt").write_text("t1")
    (tmp_path / "b" / "train" / "notes.md").write_text("not text for us")
    write_jsonl(tmp_path / "b" / "valid" / "1.jsonl", ["v"])
    assert both(str(tmp_path / "b")) == (["t1", "t2", "t3"], ["v"])


@pytest.mark.parametrize("count", [2, 3, 40, 999, 1000, 3000])
def test_a_file_is_divided_by_document(tmp_path: Path, count: int) -> None:
    texts = [f"document {number} " + "word " * (number % 7) for number in range(count)]
    data = write_jsonl(tmp_path / "a.jsonl", texts)
    train, valid = both(data)
    assert train and valid and sorted(train + valid) == sorted(texts)
    assert [text for text in texts if text in set(train)] == train
    if count >= 999:
        assert 0.025 < len(valid) / count < 0.075
    reversed_train, _ = both(write_jsonl(tmp_path / "b.jsonl", texts[::-1]))
    assert sorted(reversed_train) == sorted(train)  # the side is the document's own, not its place's


def test_equal_documents_are_on_one_side(tmp_path: Path) -> None:
    texts = [f"text {number % 300}" for number in range(2000)]
    train, valid = both(write_jsonl(tmp_path / "a.jsonl", texts))
    assert valid and not set(train) & set(valid)


def test_small_sources_hold_out_enough_characters(tmp_path: Path) -> None:
    texts = ["x" * 10 + str(number) for number in range(20)] + ["y" * 1000 + str(number) for number in range(20)]
    _, valid = both(write_jsonl(tmp_path / "a.jsonl", texts))
    assert sum(map(len, valid)) >= 0.05 * sum(map(len, texts))


def test_an_only_document_is_cut_in_two(tmp_path: Path) -> None:
    text = "word and " * 200
    train, valid = both(write_jsonl(tmp_path / "a.jsonl", [text]))
    assert train[0] + valid[0] == text and train[0].endswith(" ")
    assert 0.03 < len(valid[0]) / len(text) < 0.07
    dense = "x" * 100
    train, valid = both(write_jsonl(tmp_path / "b.jsonl", [dense]))
    assert (len(train[0]), len(valid[0])) == (95, 5)


def test_a_folder_without_valid_is_divided(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [f"text {number}" for number in range(50)])
    train, valid = both(str(tmp_path))
    assert len(train) + len(valid) == 50 and valid


BAD_LINES = [
    (b'{"text": "a"}\n{"text": }\n', ":2: not JSON"),
    (b'{"text": "a"}\n\n{"txt": "b"}\n', ':3: no "text"'),
    (b'{"text": 5}\n', ':1: no "text"'),
    (b'["text"]\n', ':1: no "text"'),
    (b'{"text": "a"}\n{"text": "\xff\xfe"}\n', ":2: not UTF-8"),
    (b"[" * 100_000, ":1: not JSON"),
    (b'{"text": ""}\n', "no document"),
    (b"  \n\n", "no document"),
]


@pytest.mark.parametrize(("content", "says"), BAD_LINES)
def test_a_bad_line_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    for split in ("train", "valid", "all"):
        with pytest.raises(UserError, match=says) as caught:
            list(read_documents(str(path), split))  # type: ignore[arg-type]
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_bad_sources(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "half.bin").write_bytes(b"")
    write_jsonl(tmp_path / "only" / "valid.jsonl", ["v"])
    cases = {
        "empty.jsonl": "the file is empty",
        "missing.jsonl": "no such data",
        "a.csv": "unknown kind of data",
        "folder": "no train.jsonl",
        "only": "no train.jsonl",
        "half": "half.idx is missing",
    }
    for name, says in cases.items():
        with pytest.raises(UserError, match=says):
            check_source(str(tmp_path / name))
    with pytest.raises(UserError, match=r"builtin:docs, builtin:code, builtin:science"):
        check_source("builtin:wiki")
    with pytest.raises(UserError, match=r"unknown data builtin:wiki"):
        list(read_documents("builtin:wiki"))


def test_fingerprint_follows_the_bytes(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", ["one"])
    first = source_fingerprint(data)
    copy = tmp_path / "other" / "b.jsonl"
    copy.parent.mkdir()
    copy.write_bytes(Path(data).read_bytes())
    assert source_fingerprint(str(copy)) == first
    write_jsonl(tmp_path / "a.jsonl", ["two"])
    assert source_fingerprint(data) != first


def test_remembered_hash_follows_size_and_time(tmp_path: Path) -> None:
    data, memo = write_jsonl(tmp_path / "a.jsonl", ["one"]), tmp_path / "memo"
    os.utime(data, (1e9, 1e9))
    first = source_fingerprint(data, memo)
    assert first == source_fingerprint(data)
    Path(data).write_text(Path(data).read_text().replace("one", "two"))
    os.utime(data, (1e9, 1e9))
    assert source_fingerprint(data, memo) == first  # it was not read again: size and time are as before
    os.utime(data, (1e9, 1e9 + 1))
    assert source_fingerprint(data, memo) == source_fingerprint(data) != first
