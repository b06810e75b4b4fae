"""Writing files whole or not at all, and errors of the file system in one line."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from elle_mp.errors import UserError


@contextmanager
def file_errors(doing: str, path: Path) -> Iterator[None]:
    """Turns an ``OSError`` (read-only, full disk, no permission) into a one-line :class:`UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot {doing} {path}: {error.strerror or error}") from error


def beside(path: Path) -> Path:
    """A temporary name in the folder of ``path``; the process is in it, so that two writers do not meet."""
    return path.with_name(f".{path.name}.writing-{os.uname().nodename}-{os.getpid()}")


def sync_file(path: Path) -> None:
    """Asks the system to have the file's bytes on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: bytes) -> None:
    """Writes a small file so that ``path`` is at any moment the old file or the new one.

    Raises:
        UserError: the folder cannot be written to.
    """
    temporary = beside(path)
    with file_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            sync_file(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with file_errors("read", path), path.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def remembered_hash(path: Path, memo_dir: Path, name: str) -> str:
    """:func:`sha256_file`, kept in ``memo_dir/name`` for as long as the file's size and time of change stay.

    A file changed in the last two seconds is not remembered: it could change again within the clock's
    resolution.
    """
    with file_errors("read", path):
        status = path.stat()
    stamp = f"{status.st_size} {status.st_mtime_ns} "
    memo = memo_dir / name
    if memo.is_file():
        kept = memo.read_text()
        if kept.startswith(stamp):
            return kept[len(stamp) :]
    digest = sha256_file(path)
    if time.time_ns() - status.st_mtime_ns > 2_000_000_000:
        write_whole(memo, (stamp + digest).encode())
    return digest
