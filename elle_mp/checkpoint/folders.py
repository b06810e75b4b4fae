"""The folders of a run's checkpoints: written beside and renamed, so each is complete or not there."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from elle_mp.checkpoint.agreement import Team
from elle_mp.checkpoint.manifest import FORMAT, META, FileEntries, read_manifest
from elle_mp.data.files import sha256_file, sync_file, write_whole

LATEST = "latest"
UNFINISHED = ".tmp-"  # a folder with this in its name is being written or removed
REPLACED = f"{UNFINISHED}old"  # the complete checkpoint that a new one of the same name is about to replace


def check_name(name: str) -> None:
    """Refuses what is no name for a checkpoint.

    Raises:
        ValueError: it is none.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or UNFINISHED in name or name == LATEST:
        raise ValueError(f"not a name for a checkpoint: {name!r}")


def folders_in(parent: Path) -> dict[str, Path]:
    """The folder of every checkpoint, complete or not, by name."""
    entries = sorted(path for path in parent.glob("*") if path.is_dir())
    folders = {path.name: path for path in entries if UNFINISHED not in path.name}
    for path in entries:
        if path.name.endswith(REPLACED):
            folders.setdefault(path.name.removesuffix(REPLACED), path)
    return folders


def write_checkpoint(
    team: Team,
    parent: Path,
    name: str,
    write: Callable[[Path], FileEntries],
    meta: dict[str, Any],
    permanent: bool,
) -> None:
    """Has ``write`` fill a temporary folder and makes the checkpoint ``name`` of it. Collective.

    Args:
        write: collective; returns the files that it has hashed, the same on all ranks.

    Raises:
        UserError: it cannot be written; on all ranks. Nothing of it is left.
    """
    doing = f"cannot write checkpoint {parent / name}"
    temporary = team.on_first(lambda: _start(parent, name), doing)
    try:
        hashed = write(temporary)
        shares = team.together(lambda: _hash_share(temporary, hashed, team), doing)
        files = dict(sorted((hashed | {file: share[file] for share in shares for file in share}).items()))
        manifest = {"permanent": permanent, "ranks": team.size, "meta": meta, "files": files}
        team.on_first(lambda: _finish(parent, name, temporary, manifest), doing)
    except BaseException:
        if team.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove(folder: Path) -> None:
    """Removes a checkpoint; a kill meanwhile leaves no half of it under its name."""
    gone = folder.with_name(f"{folder.name}{UNFINISHED}{uuid.uuid4().hex[:8]}")
    os.replace(folder, gone)
    shutil.rmtree(gone)


def _start(parent: Path, name: str) -> Path:
    """Removes what killed runs left and makes the folder to write into."""
    parent.mkdir(parents=True, exist_ok=True)
    for replaced, folder in folders_in(parent).items():
        if folder.name.endswith(REPLACED):  # killed between the two renames of a replacement
            os.replace(folder, parent / replaced)
    for leftover in parent.glob(f"*{UNFINISHED}*"):
        shutil.rmtree(leftover)
    temporary = parent / f"{name}{UNFINISHED}{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    return temporary


def _hash_share(folder: Path, hashed: FileEntries, team: Team) -> FileEntries:
    """Size and SHA-256 of this rank's share of the files that are not in ``hashed``."""
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    left = [file for file in files if file not in hashed]
    return {
        file: {"size": (folder / file).stat().st_size, "sha256": sha256_file(folder / file)}
        for file in left[team.rank :: team.size]
    }


def _finish(parent: Path, name: str, temporary: Path, manifest: dict[str, Any]) -> None:
    folders = folders_in(parent).values()
    serials = [read_manifest(folder).serial for folder in folders if (folder / META).is_file()]
    content = {"format": FORMAT, "serial": max(serials, default=0) + 1} | manifest
    write_whole(temporary / META, (json.dumps(content, indent=1) + "\n").encode())
    sync_file(temporary)
    final, replaced = parent / name, parent / f"{name}{REPLACED}"
    if final.exists():
        os.replace(final, replaced)
    os.replace(temporary, final)
    sync_file(parent)
    write_whole(parent / LATEST, f"{name}\n".encode())
    shutil.rmtree(replaced, ignore_errors=True)
