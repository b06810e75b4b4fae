"""The checkpoints of a run: written beside and renamed, so each is complete or not there."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from elle_mp.checkpoint.agreement import on_first_rank, rank, together, world_size
from elle_mp.checkpoint.tensor_files import check_fit, read_tensors, stored_tensors, write_tensors
from elle_mp.data.files import file_errors, sha256_file, sync_file, write_whole
from elle_mp.errors import UserError

FORMAT = 1
META = "meta.json"
LATEST = "latest"
UNFINISHED = ".tmp-"  # a folder with this in its name is being written or removed
REPLACED = f"{UNFINISHED}old"  # the complete checkpoint that a new one of the same name is about to replace

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Manifest:
    """What ``meta.json`` holds: the caller's ``meta``, the order of the checkpoints, and the files."""

    meta: dict[str, Any]
    serial: int
    permanent: bool
    files: dict[str, dict[str, Any]]


class _DamagedError(UserError):
    """A file of a checkpoint is missing or is not as it was written."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}; remove the checkpoint's folder to go on from an older one")


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
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or UNFINISHED in name or name == LATEST:
            raise ValueError(f"not a name for a checkpoint: {name!r}")
        doing = f"cannot write checkpoint {self.folder / name}"
        content = json.dumps(dict(meta))  # before anything is written: it may not be JSON
        temporary = on_first_rank(lambda: self._start(name), doing)
        try:
            together(lambda: write_tensors(temporary, tensors), doing)
            hashes = together(lambda: self._hash_share(temporary), doing)
            files = {file: entry for share in hashes for file, entry in sorted(share.items())}
            on_first_rank(lambda: self._finish(name, temporary, json.loads(content), permanent, files), doing)
        except UserError:
            if rank() == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

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
            passing = [name for name in self.names() if not self._manifest(self._folder(name)).permanent]
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
                serials[name] = self._check_sizes(folder).serial
            except _DamagedError:
                continue  # as good as not there
        return sorted(serials, key=lambda name: (serials[name], name))

    def meta(self, name: str) -> dict[str, Any]:
        """What :meth:`save` was given as ``meta``.

        Raises:
            UserError: there is no such checkpoint, or it is damaged.
        """
        return self._manifest(self._folder(name)).meta

    def verify(self, name: str) -> None:
        """Reads every file and compares its hash with the one taken when it was written.

        Raises:
            UserError: there is no such checkpoint, or a file is missing or damaged; names the file.
        """
        self._check_files(self._folder(name), 0, 1)

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

    def _hash_share(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Size and SHA-256 of this rank's share of the files, relative to ``folder``."""
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {
            str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": sha256_file(path)}
            for path in files[rank() :: world_size()]
        }

    def _finish(
        self,
        name: str,
        temporary: Path,
        meta: dict[str, Any],
        permanent: bool,
        files: dict[str, dict[str, Any]],
    ) -> None:
        serials = [self._manifest(folder).serial for folder in self._folders().values() if (folder / META).is_file()]
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

    def _manifest(self, folder: Path) -> _Manifest:
        path = folder / META
        if not path.is_file():
            raise _DamagedError(f"{path} is missing")
        with file_errors("read", path):
            text = path.read_text(errors="replace")
        try:
            content = json.loads(text)
            version = content["format"]
            if version != FORMAT:
                raise UserError(f"{path}: format {version}; this elle_mp reads format {FORMAT}")
            return _Manifest(content["meta"], content["serial"], content["permanent"], content["files"])
        except (ValueError, KeyError, TypeError) as error:
            raise _DamagedError(f"{path} is damaged") from error

    def _check_sizes(self, folder: Path) -> _Manifest:
        manifest = self._manifest(folder)
        for file, entry in manifest.files.items():
            path = folder / file
            size = path.stat().st_size if path.is_file() else None
            if size != entry["size"]:
                found = "is missing" if size is None else f"has {size} bytes, not {entry['size']}"
                raise _DamagedError(f"{path} {found}")
        return manifest

    def _check_files(self, folder: Path, share: int, shares: int) -> None:
        """Compares sizes of all files and hashes of every ``shares``-th."""
        manifest = self._check_sizes(folder)
        for file in sorted(manifest.files)[share::shares]:
            if sha256_file(folder / file) != manifest.files[file]["sha256"]:
                raise _DamagedError(f"{folder / file} is damaged (its SHA-256 is not the one written)")
