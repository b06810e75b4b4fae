"""Documents from whatever the user names as data.

``data`` is a ``.jsonl`` file (``{"text": ...}`` a line), a ``.txt`` file (documents separated by blank
lines), a folder that holds ``train`` and ``valid`` of either, the prefix of a ``.bin``/``.idx`` pair, or
``builtin:NAME``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Literal

from elle_mp.data import builtin
from elle_mp.data.files import file_errors, remembered_hash, sha256_file
from elle_mp.data.hashing import derive_key
from elle_mp.errors import UserError

Split = Literal["train", "valid", "all"]
BUILTIN = "builtin:"
SUFFIXES = (".jsonl", ".txt")
VALID_EVERY = 20
"""Without a valid part of its own, one document in twenty is held out, by a hash of its text."""
SMALL_DOCUMENTS = 1000
"""A source of fewer documents is divided by its characters instead."""


def check_source(data: str) -> None:
    """Cheap checks before anything starts: the name is known, the files are there and readable.

    Raises:
        UserError: one line that names ``data`` and what would be right.
    """
    if data.startswith(BUILTIN):
        builtin.check_name(data[len(BUILTIN) :])
    elif indexed_prefix(data) is None:
        for path in source_files(data, "all"):
            with file_errors("read", path), path.open("rb") as handle:
                if not handle.read(1):
                    raise UserError(f"{path}: the file is empty; give at least one document")


def indexed_prefix(data: str) -> Path | None:
    """The prefix when ``data`` names a tokenised ``.bin``/``.idx`` pair (by the prefix or either file), else
    None.

    Raises:
        UserError: one file of the pair is missing.
    """
    path = Path(data)
    if path.suffix in (".bin", ".idx") and path.is_file():
        path = path.with_suffix("")
    elif path.exists():
        return None
    present = [path.with_name(path.name + suffix).is_file() for suffix in (".bin", ".idx")]
    if any(present) and not all(present):
        missing = ".idx" if present[0] else ".bin"
        raise UserError(f"{path}{missing} is missing; a tokenised data set is a pair of .bin and .idx")
    return path if all(present) else None


def source_files(data: str, split: Split) -> list[Path]:
    """The text files behind a file or folder, in the order in which they are read.

    A single file, and a folder without a valid part, stand for every split: the caller divides by document.

    Raises:
        UserError: missing, of another kind, or a folder without ``train``.
    """
    path = Path(data)
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise UserError(f"{path}: unknown kind of data; give .jsonl, .txt, a folder, .bin/.idx or builtin:NAME")
        return [path]
    if not path.is_dir():
        raise UserError(
            f"no such data: {data}; give a .jsonl or .txt file, a folder, a .bin/.idx prefix or builtin:NAME"
        )
    train, valid = (folder_part(path, name) for name in ("train", "valid"))
    if not train:
        raise UserError(f"{path}: the folder has no train.jsonl, train.txt or train/ with .jsonl or .txt files in it")
    if split == "all":
        return train + valid
    return valid if split == "valid" and valid else train


def folder_part(folder: Path, name: str) -> list[Path]:
    """``NAME.jsonl``, ``NAME.txt`` and the text files in ``NAME/``, sorted."""
    single = [folder / f"{name}{suffix}" for suffix in SUFFIXES]
    inside = sorted(path for path in (folder / name).glob("**/*") if path.suffix in SUFFIXES)
    return [path for path in single + inside if path.is_file()]


def has_valid_part(data: str) -> bool:
    """Whether the source says itself what is held out (a built-in one, or a folder with ``valid``)."""
    return data.startswith(BUILTIN) or (Path(data).is_dir() and bool(folder_part(Path(data), "valid")))


def read_documents(data: str, split: Split = "train") -> Iterator[str]:
    """The documents of ``data``, in a fixed order, one at a time.

    A source without a valid part is divided by a hash of the document (5 %, at least one document on each
    side; the only document of a source is cut in two), so equal documents are never on both sides. ``all``
    gives everything.

    Raises:
        UserError: missing or empty source, a bad line (the message names file and line), tokenised data.
    """
    if data.startswith(BUILTIN):
        yield from builtin.read_builtin(data[len(BUILTIN) :], split)
        return
    if indexed_prefix(data) is not None:
        raise UserError(f"{data} is tokenised already (.bin/.idx); text is needed here: give .jsonl, .txt or a folder")
    files = source_files(data, split)
    if split == "all" or has_valid_part(data):
        yield from not_empty(read_files(files), data)
    else:
        yield from divided(lambda: read_files(files), split, data)


def read_files(files: Iterable[Path]) -> Iterator[str]:
    """The documents of several files, one after the other."""
    return chain.from_iterable(read_jsonl(path) if path.suffix == ".jsonl" else read_text(path) for path in files)


def not_empty(documents: Iterator[str], data: str) -> Iterator[str]:
    """Passes documents on; none at all is an error."""
    first = next(documents, None)
    if first is None:
        raise UserError(f"{data}: there is no document in it; give at least one")
    yield first
    yield from documents


def divided(read: Callable[[], Iterator[str]], split: Literal["train", "valid"], data: str) -> Iterator[str]:
    """One side of a source that has no valid part, see :func:`read_documents`."""
    first = list(islice(read(), SMALL_DOCUMENTS))
    if len(first) < SMALL_DOCUMENTS:
        yield from divided_small(first, split, data)
        return
    sides = (document for document in read() if held_out(document) == (split == "valid"))
    yield from not_empty(sides, f"{data}, {split} part")


def held_out(document: str) -> bool:
    """Whether the hash of a document puts it on the valid side."""
    return document_hash(document) % VALID_EVERY == 0


def document_hash(document: str) -> int:
    """64 bits of the text."""
    digest = hashlib.blake2b(document.encode("utf-8"), digest_size=8, person=b"elle_mp split")
    return int.from_bytes(digest.digest(), "little")


def divided_small(documents: list[str], split: Literal["train", "valid"], data: str) -> Iterator[str]:
    """A side of few documents: those of the smallest hashes are held out, to 5 % of the characters.

    Counting documents alone could leave a valid text of a few words. An only document is cut in two.
    """
    kinds = sorted(set(documents), key=document_hash)
    if len(kinds) < 2:
        yield cut_in_two(documents, split, data)
        return
    wanted = sum(map(len, kinds)) / VALID_EVERY
    chosen: set[str] = set()
    for document in kinds[:-1]:
        if wanted <= 0:
            break
        chosen.add(document)
        wanted -= len(document)
    yield from (document for document in documents if (document in chosen) == (split == "valid"))


def cut_in_two(documents: list[str], split: Literal["train", "valid"], data: str) -> str:
    """The first 95 % of the only document, or the rest of it; the cut is at a blank where there is one."""
    if not documents:
        raise UserError(f"{data}: there is no document in it; give at least one")
    text = documents[0]
    cut = len(text) - max(1, len(text) // VALID_EVERY)
    blank = max(text.rfind(" ", 0, cut), text.rfind("\n", 0, cut))
    cut = blank + 1 if blank > cut // 2 else cut
    if not 0 < cut < len(text):
        raise UserError(f"{data}: its only document has {len(text)} characters; too few to hold some out")
    return text[:cut] if split == "train" else text[cut:]


def read_jsonl(path: Path) -> Iterator[str]:
    """The ``text`` of every line; lines of white space and empty texts are passed over.

    Raises:
        UserError: a line that is not UTF-8, not JSON, or has no ``text`` string; the message names file and
            line.
    """
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            why = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            raise UserError(f'{path}:{number}: not JSON ({why}); each line must be like {{"text": "..."}}') from error
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise UserError(f'{path}:{number}: no "text" string in this line; each line must be like {{"text": "..."}}')
        if text:
            yield clean(text)


def read_text(path: Path) -> Iterator[str]:
    """The documents of a text file: what stands between blank lines, or the whole file."""
    block: list[str] = []
    for _, line in numbered_lines(path):
        if line.strip():
            block.append(line)
        elif block:
            yield "".join(block).rstrip("\r\n")
            block = []
    if block:
        yield "".join(block).rstrip("\r\n")


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file with their ends, from 1; a byte order mark is dropped."""
    with file_errors("read", path), path.open("rb") as handle:
        for number, raw in enumerate(handle, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}:{number}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
            yield number, line


def clean(text: str) -> str:
    """``text`` with each half of a broken surrogate pair, which no encoding can hold, as U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def source_fingerprint(data: str, memo_dir: Path | None = None) -> str:
    """A hash of what ``data`` holds: of the bytes and names of its files, or of what a built-in source reads.

    Args:
        data: see the module.
        memo_dir: a folder in which the hash of each file is remembered by (path, size, time of change), so
            that unchanged files are not read again.
    """
    if data.startswith(BUILTIN):
        return builtin.fingerprint(data[len(BUILTIN) :])
    digest = hashlib.sha256()
    root = Path(data)
    for path in source_files(data, "all"):
        name = path.relative_to(root).as_posix() if root.is_dir() else path.suffix
        if memo_dir is None:
            content = sha256_file(path)
        else:
            content = remembered_hash(path, memo_dir, f"{derive_key(str(path.resolve())):016x}")
        digest.update(f"{name}\0{content}\0".encode())
    return digest.hexdigest()
