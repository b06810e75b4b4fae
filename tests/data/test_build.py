"""Tokenised domains: what is in them, found again without reading, whole or not there at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from elle_mp.data import build
from elle_mp.data.build import (
    build_prefix,
    check_token_range,
    open_prefix,
    prepare_domain,
    read_manifest,
    tokenize,
    verify_prefix,
)
from elle_mp.data.indexed import IndexedDataset, IndexedWriter, bin_path
from elle_mp.data.sources import read_documents
from elle_mp.data.tokenizer import Tokenizer, train_sentencepiece
from elle_mp.errors import UserError
from tests.data.text import make_texts


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A small one."""
    return train_sentencepiece(make_texts(300), 400, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def data(tmp_path: Path) -> str:
    """A file of 400 documents that was not changed just now."""
    path = tmp_path / "text" / "a.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts(400, seed=1)))
    os.utime(path, (1e9, 1e9))
    return str(path)


def texts_of(dataset: IndexedDataset, tokenizer: Tokenizer) -> list[str]:
    """The documents as text; each must end with eos and hold no other."""
    for index in range(len(dataset)):
        document = dataset.document(index)
        assert document[-1] == tokenizer.eos_id and (document[:-1] != tokenizer.eos_id).all()
    return [tokenizer.decode(dataset.document(index)) for index in range(len(dataset))]


def test_both_splits_hold_the_text(data: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    domain = prepare_domain("docs", data, tokenizer, tmp_path / "cache", lambda *now: seen.append(now))
    assert texts_of(domain.train, tokenizer) == list(read_documents(data, "train"))
    assert texts_of(domain.valid, tokenizer) == list(read_documents(data, "valid"))
    assert domain.train.tokens.dtype == np.uint16
    assert seen[-1] == ("valid", len(domain.valid), domain.valid_tokens)
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.name != "hashes")
    about = json.loads((folder / "manifest.json").read_text())
    assert about["train"]["tokens"] == domain.train_tokens == int(domain.train.lengths.sum())
    assert about["valid"]["documents"] == len(domain.valid)
    assert verify_prefix(folder / "train", tokenizer)[1] == "checksum: as the manifest says"


def test_a_second_run_reads_nothing_again(
    data: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare_domain("docs", data, tokenizer, tmp_path / "cache")
    before = bin_path(first.train.prefix).stat().st_mtime_ns
    opened: list[str] = []
    original = Path.open

    def watch(path: Path, *args: object, **more: object) -> object:
        opened.append(str(path))
        return original(path, *args, **more)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", watch)
    monkeypatch.setattr(build, "tokenize", lambda *_: pytest.fail("tokenised again"))
    # The check that the file is not empty opens it once, for one byte.
    monkeypatch.setattr("elle_mp.data.files.sha256_file", lambda _: pytest.fail("hashed again"))
    again = prepare_domain("docs", data, tokenizer, tmp_path / "cache")
    assert opened.count(data) == 1
    assert np.array_equal(again.train.tokens, first.train.tokens)
    assert bin_path(again.train.prefix).stat().st_mtime_ns == before


def test_other_text_or_another_tokenizer_is_built_anew(data: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = prepare_domain("docs", data, tokenizer, cache)
    other = train_sentencepiece(make_texts(300), 350, tmp_path / "other")
    assert prepare_domain("docs", data, other, cache).train.prefix != first.train.prefix
    Path(data).write_text(Path(data).read_text() + '{"text": "one more"}\n')
    changed = prepare_domain("docs", data, tokenizer, cache)
    assert changed.train.prefix != first.train.prefix
    assert len(changed.train) + len(changed.valid) == 401
    assert np.array_equal(prepare_domain("x", data, tokenizer, cache).train.tokens, changed.train.tokens)


def test_an_error_in_the_middle_leaves_nothing(data: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    Path(data).write_text(Path(data).read_text() + "{broken\n")
    with pytest.raises(UserError, match=":401: not JSON"):
        prepare_domain("docs", data, tokenizer, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.name != "hashes"] == []


def test_a_kill_in_the_middle_leaves_no_half_cache(data: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    cache, ready = tmp_path / "cache", tmp_path / "ready"
    tokenizer.save(tmp_path / "tok")
    program = f"""
import sys, time
from pathlib import Path
from elle_mp.data.build import prepare_domain
from elle_mp.data.tokenizer import Tokenizer
def stop(split, documents, tokens):
    if split == "valid":
        Path({str(ready)!r}).touch()
        time.sleep(60)
prepare_domain("docs", {data!r}, Tokenizer.load(Path({str(tmp_path / "tok")!r})), Path({str(cache)!r}), stop)
"""
    process = subprocess.Popen([sys.executable, "-c", program])
    deadline = time.monotonic() + 60
    while not ready.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert ready.exists()
    left = [path for path in cache.iterdir() if path.name != "hashes"]
    assert len(left) == 1 and left[0].name.startswith(".")  # only a temporary folder
    domain = prepare_domain("docs", data, tokenizer, cache)
    assert texts_of(domain.train, tokenizer) == list(read_documents(data, "train"))
    assert [path.name for path in cache.iterdir() if path.name.startswith(".")] == []


def test_two_processes_at_once(
    data: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process ends first: its folder stays, ours goes."""
    cache = tmp_path / "cache"
    rival = prepare_domain("docs", data, tokenizer, tmp_path / "rival").train.prefix.parent

    def slow(*args: object, **more: object) -> object:
        result = tokenize(*args, **more)  # type: ignore[arg-type]
        if not (cache / rival.name).exists():
            rival.rename(cache / rival.name)
        return result

    monkeypatch.setattr(build, "tokenize", slow)
    domain = prepare_domain("docs", data, tokenizer, cache)
    assert texts_of(domain.valid, tokenizer) == list(read_documents(data, "valid"))
    assert sorted(path.name for path in cache.iterdir()) == sorted(["hashes", rival.name])


def test_a_damaged_cache_says_what_to_remove(data: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    prefix = prepare_domain("docs", data, tokenizer, tmp_path / "cache").train.prefix
    bin_path(prefix).write_bytes(b"")
    with pytest.raises(UserError, match=f"remove {prefix.parent} and run again"):
        prepare_domain("docs", data, tokenizer, tmp_path / "cache")


def test_a_place_that_cannot_be_written_to(data: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        prepare_domain("docs", data, tokenizer, tmp_path / "file" / "cache")
    with pytest.raises(UserError, match="cannot write"):
        build_prefix(data, tokenizer, tmp_path / "file" / "out")


def test_too_little_text_is_an_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a few words"}\n{"text": "and more"}\n')
    domain = prepare_domain("tiny", str(tmp_path / "a.jsonl"), tokenizer, tmp_path / "cache")
    with pytest.raises(UserError, match=r"domain tiny, valid text: \d+ tokens .* too few for one sample of 129"):
        domain.packed("valid", 128, "causal")
    assert len(domain.packed("train", 2, "causal")) > 0


def test_prefix_build_verify_and_reuse(data: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "out" / "pre.fix"
    about = build_prefix(data, tokenizer, out)
    assert about["documents"] == 400
    assert sorted(path.name for path in out.parent.iterdir()) == [
        "pre.fix.bin",
        "pre.fix.idx",
        "pre.fix.json",
    ]
    assert texts_of(IndexedDataset(out), tokenizer) == list(read_documents(data, "all"))
    assert len(verify_prefix(out, tokenizer)) == 4
    for name in (str(out), f"{out}.bin", f"{out}.idx"):
        domain = prepare_domain("docs", name, tokenizer, tmp_path / "cache")
        assert len(domain.train) + len(domain.valid) == 400
        assert 0 < domain.valid_tokens <= 0.05 * about["tokens"] + max(domain.valid.lengths)
        assert not (tmp_path / "cache").exists()
    with pytest.raises(UserError, match="is there already"):
        build_prefix(data, tokenizer, out)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{')
    with pytest.raises(UserError, match=":2: not JSON"):
        build_prefix(str(broken), tokenizer, out, overwrite=True)
    assert len(verify_prefix(out, tokenizer)) == 4  # what was there is there
    assert build_prefix(data, tokenizer, out, "valid", overwrite=True)["documents"] < 50
    with pytest.raises(UserError, match="tokenised already"):
        build_prefix(str(out), tokenizer, tmp_path / "again")


def test_verify_finds_what_is_wrong(data: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "a"
    build_prefix(data, tokenizer, out)
    other = train_sentencepiece(make_texts(300), 350, tmp_path / "other")
    for check in (lambda: verify_prefix(out, other), lambda: open_prefix("docs", out, other)):
        with pytest.raises(UserError, match="another tokenizer"):
            check()
    raw = bytearray(bin_path(out).read_bytes())
    raw[100] ^= 1
    bin_path(out).write_bytes(raw)
    with pytest.raises(UserError, match="SHA-256"):
        verify_prefix(out, tokenizer)
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(UserError, match="not a manifest"):
        verify_prefix(out)
    (tmp_path / "a.json").unlink()
    assert "not checked" in verify_prefix(out)[1]


def test_a_prefix_of_unknown_origin_is_checked_for_range(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"somebody": "else"}')
    with IndexedWriter(tmp_path / "a", "u2") as writer:
        writer.extend([np.arange(10), np.array([3, 400])])
    assert read_manifest(tmp_path / "a") is None
    with pytest.raises(UserError, match="token 400 at place 11 is outside the vocabulary of 400"):
        open_prefix("docs", tmp_path / "a", tokenizer)
    with pytest.raises(UserError, match="token 400"):
        verify_prefix(tmp_path / "a", tokenizer)
    check_token_range(IndexedDataset(tmp_path / "a"), 401)
    with IndexedWriter(tmp_path / "one", "u2") as writer:
        writer.add(np.arange(10))
    with pytest.raises(UserError, match="1 documents; at least two"):
        open_prefix("docs", tmp_path / "one", tokenizer)


def test_batches_of_documents_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "BATCH_CHARACTERS", 10)
    monkeypatch.setattr(build, "BATCH_DOCUMENTS", 3)
    lists = list(build.batched(iter(["a", "b", "c", "d", "x" * 20, "e" * 6, "f" * 6])))
    assert lists == [["a", "b", "c"], ["d"], ["x" * 20], ["e" * 6], ["f" * 6]]
    assert list(build.batched(iter([]))) == []
