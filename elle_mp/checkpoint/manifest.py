"""``meta.json`` of a checkpoint: the caller's meta, and every file with its size and SHA-256."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elle_mp.data.files import file_errors, sha256_file
from elle_mp.errors import UserError

FORMAT = 1
META = "meta.json"

FileEntries = dict[str, dict[str, Any]]
"""``{"size": bytes, "sha256": hexadecimal}`` by the file's path relative to the checkpoint's folder."""


@dataclass(frozen=True)
class Manifest:
    """What ``meta.json`` holds: the caller's ``meta``, the order of the checkpoints, and the files."""

    meta: dict[str, Any]
    serial: int
    permanent: bool
    files: FileEntries
    ranks: int | None = None
    """How many wrote it; ``None`` if it was written before that was noted."""


class DamagedError(UserError):
    """A file of a checkpoint is missing or is not as it was written."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}; remove the checkpoint's folder to go on from an older one")


def read_manifest(folder: Path) -> Manifest:
    """Reads ``folder/meta.json``.

    Raises:
        DamagedError: it is missing or cannot be parsed.
        UserError: it is of another format version.
    """
    path = folder / META
    if not path.is_file():
        raise DamagedError(f"{path} is missing")
    with file_errors("read", path):
        text = path.read_text(errors="replace")
    try:
        content = json.loads(text)
        version = content["format"]
        if version != FORMAT:
            raise UserError(f"{path}: format {version}; this elle_mp reads format {FORMAT}")
        return Manifest(
            content["meta"], content["serial"], content["permanent"], content["files"], content.get("ranks")
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{path} is damaged") from error


def check_sizes(folder: Path) -> Manifest:
    """Reads the manifest and compares the size of every file.

    Raises:
        DamagedError: a file is missing or has another size; names it.
    """
    manifest = read_manifest(folder)
    for file, entry in manifest.files.items():
        path = folder / file
        size = path.stat().st_size if path.is_file() else None
        if size != entry["size"]:
            found = "is missing" if size is None else f"has {size} bytes, not {entry['size']}"
            raise DamagedError(f"{path} {found}")
    return manifest


def check_hash(folder: Path, manifest: Manifest, file: str) -> None:
    """Compares the SHA-256 of one file with the one in the manifest.

    Raises:
        DamagedError: they differ.
    """
    if sha256_file(folder / file) != manifest.files[file]["sha256"]:
        raise DamagedError(f"{folder / file} is damaged (its SHA-256 is not the one written)")
