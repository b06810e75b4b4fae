"""The checkpoints of a run: written beside and renamed, so each is complete or not there."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elle_mp.checkpoint.agreement import on_first_rank, rank, together, world_size
from elle_mp.checkpoint.manifest import (
    FORMAT,
    META,
    DamagedError,
    FileEntries,
    check_hash,
    check_sizes,
    read_manifest,
)
from elle_mp.checkpoint.stream_writer import write_metadata, write_share
from elle_mp.checkpoint.tensor_files import check_fit, read_tensors, stored_tensors, write_tensors
from elle_mp.data.files import sha256_file, sync_file, write_whole
from elle_mp.errors import UserError
from elle_mp.ops.random import Bounds

LATEST = "latest"
UNFINISHED = ".tmp-"  # a folder with this in its name is being written or removed
REPLACED = f"{UNFINISHED}old"  # the complete checkpoint that a new one of the same name is about to replace

logger = logging.getLogger(__name__)


class CheckpointStore:
    """The folder ``<run>/checkpoints``: a folder per checkpoint, and ``latest`` with the last one's name.

    ``save``, ``load`` and ``prune`` are collective over the default process group (or work without one); if
    one rank fails, all raise the same error. The rest only reads, on any rank.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def save(self, name: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], permanent: bool = False) -> None:
        """Writes a checkpoint and makes it the latest; one of the same name is replaced at the very end.

        Args:
            name: letters, digits, ``.``, ``_`` and ``-``.
            tensors: DTensors, and plain tensors that are equal on all ranks, by name.
            meta: any JSON; rank 0's is written.
            permanent: :meth:`prune` never removes it.

        Raises:
            UserError: it cannot be written (full disk, read-only). Nothing of it is left; ``latest`` stands.
        """

        def write(folder: Path, doing: str) -> FileEntries:
            together(lambda: write_tensors(folder, tensors), doing)
            return {}

        self._save(name, write, meta, permanent)

    def save_streamed(
        self,
        name: str,
        tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        produce: Callable[[str, Bounds], Tensor],
        meta: Mapping[str, Any],
        permanent: bool = False,
        block_bytes: int = 16 << 20,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """:meth:`save` of tensors that are computed block by block: no rank holds more than one block at a time.

        The ranks share the blocks out, in order and balanced by bytes. What is written is an ordinary checkpoint.

        Args:
            tensors: global shape and dtype by name; equal on all ranks.
            produce: returns the block of a tensor within half-open global bounds per dimension (``()`` for a
                scalar), of the declared dtype. Called once per block, on one rank.
            block_bytes: the largest block; blocks are rows (dim 0), and parts of a row where a row is larger.
            progress: called on each rank after each of its blocks with the bytes written since the last call.

        Raises:
            UserError: as for :meth:`save`, and when ``produce`` raises. Nothing of it is left; ``latest`` stands.
        """

        def write(folder: Path, doing: str) -> FileEntries:
            shares = together(
                lambda: write_share(folder, tensors, produce, block_bytes, rank(), world_size(), progress), doing
            )
            results = [share.results for share in shares]
            on_first_rank(lambda: write_metadata(folder, tensors, block_bytes, results), doing)
            return {file: entry for share in shares for file, entry in share.files.items()}

        self._save(name, write, meta, permanent)

    def load(self, name: str, tensors: Mapping[str, Tensor], partial: bool = False) -> None:
        """Fills ``tensors`` in place, under whatever layout they have. The files' hashes are checked first.

        Args:
            partial: what else the checkpoint holds is left alone (a model without its optimizer).

        Raises:
            UserError: there is no such checkpoint, a file is damaged, or a tensor is missing, left over or of
                another shape; names the first.
        """
        doing = f"cannot read checkpoint {self.folder / name}"

        def check() -> tuple[Path, set[str]]:
            folder = self._folder(name)
            self._check_files(folder, rank(), world_size())
            return folder, set(tensors)

        checked = together(check, doing)
        folder = checked[rank()][0]
        everywhere = None if partial else set().union(*(names for _, names in checked))
        wanted = {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()}
        together(lambda: check_fit(stored_tensors(folder), wanted, everywhere), doing)
        together(lambda: read_tensors(folder, tensors), doing)

    def prune(self, keep: int) -> list[str]:
        """Removes all but the newest ``keep``; permanent ones and the latest stay, permanent ones uncounted.

        Returns:
            The names of those removed.

        Raises:
            UserError: one cannot be removed.
        """

        def remove() -> list[str]:
            latest = self.latest()
            passing = [name for name in self.names() if not read_manifest(self._folder(name)).permanent]
            old = [name for name in passing[: max(0, len(passing) - keep)] if name != latest]
            for name in old:
                gone = self.folder / f"{name}{UNFINISHED}{uuid.uuid4().hex[:8]}"
                os.replace(self._folder(name), gone)
                shutil.rmtree(gone)
            return old

        return on_first_rank(remove, f"cannot remove old checkpoints in {self.folder}")

    def latest(self) -> str | None:
        """The name of the last complete checkpoint, or ``None`` if there is none.

        If the one named in ``latest`` is missing or has not all its bytes, the newest complete one, with a
        warning in the log. Files are compared by size here and by hash in :meth:`load`.

        Raises:
            UserError: a checkpoint is of another format version than this program's.
        """
        names = self.names()
        pointer = self.folder / LATEST
        named = pointer.read_text().strip() if pointer.is_file() else None
        if named in names:
            return named
        newest = names[-1] if names else None
        if newest is not None or named is not None:
            wrong = f"{named} is missing or damaged" if named else f"{pointer} is missing"
            goes_on = f"the newest complete one is {newest}" if newest else "there is no other"
            logger.warning("checkpoint %s; %s", wrong, goes_on)
        return newest

    def names(self) -> list[str]:
        """The complete checkpoints, oldest first.

        Raises:
            UserError: a checkpoint is of another format version than this program's.
        """
        serials = {}
        for name, folder in self._folders().items():
            try:
                serials[name] = check_sizes(folder).serial
            except DamagedError:
                continue  # as good as not there
        return sorted(serials, key=lambda name: (serials[name], name))

    def meta(self, name: str) -> dict[str, Any]:
        """What :meth:`save` was given as ``meta``.

        Raises:
            UserError: there is no such checkpoint, or it is damaged.
        """
        return read_manifest(self._folder(name)).meta

    def set_meta(self, name: str, meta: Mapping[str, Any]) -> None:
        """Replaces what :meth:`save` was given as ``meta``, whole or not at all; the tensors stay. Not collective.

        Raises:
            UserError: there is no such checkpoint, or it cannot be written.
        """
        path = self._folder(name) / META
        read_manifest(path.parent)
        content = json.loads(path.read_text()) | {"meta": dict(meta)}
        write_whole(path, (json.dumps(content, indent=1) + "\n").encode())

    def verify(self, name: str) -> None:
        """Reads every file and compares its hash with the one taken when it was written.

        Raises:
            UserError: there is no such checkpoint, or a file is missing or damaged; names the file.
        """
        self._check_files(self._folder(name), 0, 1)

    def _save(
        self, name: str, write: Callable[[Path, str], FileEntries], meta: Mapping[str, Any], permanent: bool
    ) -> None:
        """Has ``write`` fill a temporary folder (it is collective) and makes a checkpoint of it.

        Args:
            write: gets the folder and what an error's message starts with; returns the files it has hashed.
        """
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or UNFINISHED in name or name == LATEST:
            raise ValueError(f"not a name for a checkpoint: {name!r}")
        doing = f"cannot write checkpoint {self.folder / name}"
        content = json.dumps(dict(meta))  # before anything is written: it may not be JSON
        temporary = on_first_rank(lambda: self._start(name), doing)
        try:
            hashed = write(temporary, doing)
            hashes = together(lambda: self._hash_share(temporary, hashed), doing)
            files = dict(sorted((hashed | {file: share[file] for share in hashes for file in share}).items()))
            on_first_rank(lambda: self._finish(name, temporary, json.loads(content), permanent, files), doing)
        except UserError:
            if rank() == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _start(self, name: str) -> Path:
        """Removes what killed runs left and makes the folder to write into."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for replaced, folder in self._folders().items():
            if folder.name.endswith(REPLACED):  # killed between the two renames of a replacement
                os.replace(folder, self.folder / replaced)
        for leftover in self.folder.glob(f"*{UNFINISHED}*"):
            shutil.rmtree(leftover)
        temporary = self.folder / f"{name}{UNFINISHED}{uuid.uuid4().hex[:8]}"
        temporary.mkdir()
        return temporary

    def _hash_share(self, folder: Path, hashed: FileEntries) -> FileEntries:
        """Size and SHA-256 of this rank's share of the files that are not in ``hashed``."""
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        left = [file for file in files if file not in hashed]
        return {
            file: {"size": (folder / file).stat().st_size, "sha256": sha256_file(folder / file)}
            for file in left[rank() :: world_size()]
        }

    def _finish(
        self,
        name: str,
        temporary: Path,
        meta: dict[str, Any],
        permanent: bool,
        files: FileEntries,
    ) -> None:
        serials = [read_manifest(folder).serial for folder in self._folders().values() if (folder / META).is_file()]
        manifest = {
            "format": FORMAT,
            "serial": max(serials, default=0) + 1,
            "permanent": permanent,
            "meta": meta,
            "files": files,
        }
        write_whole(temporary / META, (json.dumps(manifest, indent=1) + "\n").encode())
        sync_file(temporary)
        final = self.folder / name
        replaced = self.folder / f"{name}{REPLACED}"
        if final.exists():
            os.replace(final, replaced)
        os.replace(temporary, final)
        sync_file(self.folder)
        write_whole(self.folder / LATEST, f"{name}\n".encode())
        shutil.rmtree(replaced, ignore_errors=True)

    def _folders(self) -> dict[str, Path]:
        """The folder of every checkpoint, complete or not, by name."""
        entries = sorted(path for path in self.folder.glob("*") if path.is_dir())
        folders = {path.name: path for path in entries if UNFINISHED not in path.name}
        for path in entries:
            if path.name.endswith(REPLACED):
                folders.setdefault(path.name.removesuffix(REPLACED), path)
        return folders

    def _folder(self, name: str) -> Path:
        folders = self._folders()
        if name not in folders:
            have = ", ".join(self.names()[-3:]) or "none"
            raise UserError(f"no checkpoint {name} in {self.folder} (newest: {have})")
        return folders[name]

    def _check_files(self, folder: Path, share: int, shares: int) -> None:
        """Compares sizes of all files and hashes of every ``shares``-th."""
        manifest = check_sizes(folder)
        for file in sorted(manifest.files)[share::shares]:
            check_hash(folder, manifest, file)
