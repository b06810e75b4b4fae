"""Text that every installation has: Python's own documentation and source, numpy's and torch's docstrings.

Files are parsed, never imported. The order is that of a hash of the path, and the valid split is by source
file, so nothing of one file is on both sides.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from elle_mp.errors import UserError

MAX_CHARACTERS = 4_000_000
"""A source stops here, so that the quick start stays quick."""
LONG_FILE = 200_000
"""A longer file is left out of ``code``: generated tables would be most of it."""
VALID_EVERY = 16
FORMAT = 2
"""Counts up whenever the documents made from the same files change."""

SKIPPED = frozenset(
    {
        "test",
        "tests",
        "testing",
        "idle_test",
        "idlelib",
        "lib2to3",
        "turtledemo",
        "lib-dynload",
        "site-packages",
        "dist-packages",
        "__pycache__",
        "__phello__",
        "pydoc_data",
        "_vendor",
        "_inductor",
        "_dynamo",
        "_numpy",
        "onnx",
        "fx",
        "ao",
        "_export",
        "_functorch",
        "utils",
    }
)
"""Folders that hold tests, tables and vendored or internal code rather than documentation."""

Wanted = Callable[[int], bool]
"""Whether the file with this hash is to be read."""


@dataclass(frozen=True)
class SourceFile:
    """A file and the name that its place in the order and in the splits comes from."""

    name: str
    path: Path

    @property
    def hash(self) -> int:
        """64 bits of the name."""
        return name_hash(self.name)


def check_name(name: str) -> None:
    """Raises :class:`UserError`, naming the known ones, when there is no such built-in source."""
    if name not in READERS:
        known = ", ".join(f"builtin:{known}" for known in READERS)
        raise UserError(f"unknown data builtin:{name}; known are {known}")


def read_builtin(name: str, split: Literal["train", "valid", "all"]) -> Iterator[str]:
    """The documents of ``builtin:NAME``, in a fixed order, at most about :data:`MAX_CHARACTERS`.

    Files of a split that is not asked for are not even parsed.

    Raises:
        UserError: unknown name, or an installation without the files.
    """
    check_name(name)
    room = {"train": MAX_CHARACTERS, "valid": MAX_CHARACTERS // VALID_EVERY}
    if split != "all":
        room = {split: room[split]}
    empty = True
    for key, document in READERS[name](lambda key: room.get(side_of(key), 0) > 0):
        room[side_of(key)] -= len(document)
        empty = False
        yield document
        if max(room.values()) <= 0:
            break
    if empty:
        raise UserError(f"builtin:{name}: this installation has no source files for it; give a file or folder")


def side_of(key: int) -> Literal["train", "valid"]:
    """The split of a source file, by the hash of its name."""
    return "valid" if key % VALID_EVERY == 0 else "train"


def fingerprint(name: str) -> str:
    """A hash of this reader and of the names, sizes and times of the files that it may read."""
    check_name(name)
    digest = hashlib.sha256(f"{FORMAT} {MAX_CHARACTERS} {VALID_EVERY} {name} {sys.version}".encode())
    for file in files_of(name):
        status = file.path.stat()
        digest.update(f"{file.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def files_of(name: str) -> list[SourceFile]:
    """The files that ``builtin:NAME`` may read, in its order."""
    if name == "science":
        return package_files("numpy") + package_files("torch")
    return library_files() + [file for file in [topics_file()] if file is not None and name == "docs"]


def name_hash(name: str) -> int:
    """64 bits of a name: its place in the order, and its split."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def python_files(root: Path, prefix: str) -> list[SourceFile]:
    """The Python files under ``root`` but tests and internals, in the order of their names' hashes."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED and not name.startswith(("test", "."))]
        for name in names:
            if name.endswith(".py") and not name.startswith("test"):
                path = Path(folder, name)
                found.append(SourceFile(prefix + path.relative_to(root).as_posix(), path))
    return sorted(found, key=lambda file: file.hash)


def library_files() -> list[SourceFile]:
    """The standard library."""
    return python_files(Path(sysconfig.get_paths()["stdlib"]), "")


def package_files(name: str) -> list[SourceFile]:
    """An installed package, found without importing it; empty when it is not installed."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        return []
    return python_files(Path(spec.origin).parent, f"{name}/")


def topics_file() -> SourceFile | None:
    """The help topics of pydoc, where the installation has them."""
    path = Path(sysconfig.get_paths()["stdlib"], "pydoc_data", "topics.py")
    return SourceFile("pydoc_data/topics.py", path) if path.is_file() else None


def parse(file: SourceFile) -> tuple[str, ast.Module] | None:
    """Text and syntax tree of a file, or None for one that is not valid UTF-8 or not Python (as some examples
    are).
    """
    try:
        text = file.path.read_text(encoding="utf-8")
        return text, ast.parse(text)
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError):
        return None


def read_docs(wanted: Wanted) -> Iterator[tuple[int, str]]:
    """Topics of pydoc, each by its name, then the docstrings of the standard library, a document per file."""
    topics = topics_file()
    parsed = parse(topics) if topics is not None else None
    if parsed is not None:
        texts = sorted(topic_texts(parsed[1]), key=lambda item: name_hash(item[0]))
        for name, text in texts:
            if wanted(name_hash(f"topic {name}")):
                yield name_hash(f"topic {name}"), text
    for file in library_files():
        parsed = parse(file) if wanted(file.hash) else None
        document = "\n\n".join(docstrings(parsed[1])) if parsed is not None else ""
        if document:
            yield file.hash, document


def topic_texts(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Name and text of every topic: the entries of the dictionary in pydoc_data/topics.py."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield str(key.value), value.value.strip("\n")


def docstrings(tree: ast.Module) -> Iterator[str]:
    """The docstrings of a module, each with the line that introduces what it describes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text if isinstance(node, ast.Module) else f"{heading(node)}\n{text}"


def heading(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """``class Name`` or ``name(arguments)``."""
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}"
    return f"{node.name}({ast.unparse(node.args)})"


def read_code(wanted: Wanted) -> Iterator[tuple[int, str]]:
    """The source of the standard library, a document per file."""
    for file in library_files():
        parsed = parse(file) if wanted(file.hash) else None
        if parsed is not None and 0 < len(parsed[0]) <= LONG_FILE:
            yield file.hash, parsed[0]


def read_science(wanted: Wanted) -> Iterator[tuple[int, str]]:
    """The long strings of numpy and torch (docstrings, and those that ``add_docstr`` attaches), a document
    per file.
    """
    seen: dict[str, set[str]] = {"train": set(), "valid": set()}
    for file in package_files("numpy") + package_files("torch"):
        parsed = parse(file) if wanted(file.hash) else None
        texts = dict.fromkeys(long_strings(parsed[1])) if parsed is not None else {}
        known = seen[side_of(file.hash)]
        fresh = [text for text in texts if text not in known]
        known.update(fresh)
        if fresh:
            yield file.hash, "\n\n".join(fresh)


def long_strings(tree: ast.Module) -> Iterator[str]:
    """Every string constant of several lines of prose."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > 100:
            text = inspect.cleandoc(node.value)
            if "\n" in text and " " in text:
                yield text


READERS: dict[str, Callable[[Wanted], Iterator[tuple[int, str]]]] = {
    "docs": read_docs,
    "code": read_code,
    "science": read_science,
}
"""Each gives (hash of the source file or topic, document) for the hashes that are wanted when it comes to
them.
"""
