"""The checkpoints of a run: saved at once or in the background, read under any layout, verified, kept or removed."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from elle_mp.checkpoint.agreement import Team, background_group, reason
from elle_mp.checkpoint.background import Background, Staging, come_from_gpu, staging_size
from elle_mp.checkpoint.folders import LATEST, check_name, folders_in, remove, write_checkpoint
from elle_mp.checkpoint.manifest import META, DamagedError, FileEntries, check_hash, check_sizes, read_manifest
from elle_mp.checkpoint.shards import Held, Piece, Place, Plan, check_fit, pieces_of, share_out
from elle_mp.checkpoint.stream_reader import StoredTensors
from elle_mp.checkpoint.stream_writer import Share, places_of, write_metadata, write_pieces, write_share
from elle_mp.data.files import write_whole
from elle_mp.errors import UserError
from elle_mp.ops.random import Bounds
from elle_mp.parallel.peer_errors import comes_from_a_peer

logger = logging.getLogger(__name__)


class CheckpointStore:
    """The folder ``<run>/checkpoints``: a folder per checkpoint, and ``latest`` with the last one's name.

    The methods that save, load and prune are collective over ``group`` (or work without one); if one rank fails, all
    raise the same error. They wait for a save in the background. The rest only reads, on any rank.

    Args:
        group: the ranks that hold the tensors; by default all. Ranks without a place in the layout hold none.
        background: for :meth:`save_async` alone, of the same ranks, from :func:`background_group`. Made when it is
            needed if ``group`` is all ranks.
    """

    def __init__(
        self, folder: Path, group: dist.ProcessGroup | None = None, background: dist.ProcessGroup | None = None
    ) -> None:
        self.folder = Path(folder)
        self._team = Team(group)
        self._aside = Team(background)
        self._background = Background("checkpoint")
        self._staging = Staging()
        self._plan: Plan | None = None

    def save(self, name: str, tensors: Held, meta: Mapping[str, Any], permanent: bool = False) -> None:
        """Writes a checkpoint and makes it the latest; one of the same name is replaced at the very end.

        Args:
            name: letters, digits, ``.``, ``_`` and ``-``.
            tensors: DTensors, :class:`Blocks`, and plain tensors that are equal on all ranks that have them, by name.
            meta: any JSON; rank 0's is written.
            permanent: :meth:`prune` never removes it.

        Raises:
            UserError: it cannot be written (full disk, read-only), or a save in the background could not be. Nothing
                of it is left; ``latest`` stands.
        """
        content = self._content(name, meta)
        self.wait()
        pieces, plan = self._planned(tensors, self._writing(name))
        self._write(self._team, name, pieces, plan, content, permanent)

    def save_async(
        self,
        name: str,
        tensors: Held,
        meta: Mapping[str, Any],
        permanent: bool = False,
        keep: int | None = None,
    ) -> None:
        """:meth:`save` of the tensors as they are now, that returns as soon as they are copied to staging memory.

        The copies take as much host memory on each rank as what it writes, and it is kept for the next save. A thread
        does the rest. A save in the background is waited for first. The first call makes the memory, which takes
        longer than copying, unless :meth:`prepare` has.

        Args:
            keep: :meth:`prune` after it, in the background as well.

        Raises:
            UserError: there is no memory for copies, or the save before failed. Once it has returned, an error waits:
                see :attr:`failed`.
        """
        content = self._content(name, meta)
        self.wait()
        self._open_background()
        doing = self._writing(name)
        pieces, plan = self._planned(tensors, doing)
        staged: list[Piece] = []
        self._team.together(lambda: staged.extend(self._staging.hold(pieces)), doing)

        def work() -> None:
            try:
                self._write(self._aside, name, staged, plan, content, permanent)
                if keep is not None:
                    self._prune(self._aside, keep)
            except UserError:
                raise
            except Exception as error:  # a peer that went away
                raise UserError(f"{doing}: {reason(error)}") from error

        self._background.start(work)

    def prepare(self, tensors: Held) -> None:
        """Makes ready for :meth:`save_async` of tensors of these shapes and layouts: staging memory, on a thread."""
        self.wait()
        self._open_background()
        pieces, _ = self._planned(tensors, f"cannot write checkpoints to {self.folder}")
        size, pinned = staging_size(pieces), come_from_gpu(pieces)

        def work() -> None:
            with suppress(RuntimeError, MemoryError):  # the save itself will say so, on all ranks
                self._staging.reserve(size, pinned)

        self._background.start(work)

    @property
    def failed(self) -> bool:
        """Whether the last save in the background has failed, as seen from this rank (others may see it later)."""
        return self._background.failed

    @property
    def saving(self) -> bool:
        """Whether a save goes on in the background of this rank."""
        return self._background.busy

    def wait(self) -> None:
        """Returns when no save goes on in the background.

        Raises:
            UserError: it failed; the same on all ranks, once. Nothing of it is left; ``latest`` stands.
        """
        self._background.wait()

    def close(self) -> None:
        """:meth:`wait` at the end of a run that ends with an error of its own: a failure is logged, unless it is that
        another rank has gone."""
        try:
            self.wait()
        except UserError as error:
            if not comes_from_a_peer(error):
                logger.warning("%s", error)

    def leave(self) -> None:
        """Ends the process group of saves in the background; none goes on, and none can follow."""
        if self._aside is not self._team and self._aside.group is not None:
            dist.destroy_process_group(self._aside.group)

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
        content = self._content(name, meta)
        self.wait()
        team, doing = self._team, self._writing(name)

        def write(folder: Path) -> FileEntries:
            share = lambda: write_share(folder, tensors, produce, block_bytes, team.rank, team.size, progress)  # noqa: E731
            return _written(team, folder, share, lambda: places_of(tensors, block_bytes), doing)

        write_checkpoint(team, self.folder, name, write, content, permanent)

    def load(self, name: str, tensors: Held, partial: bool = False) -> None:
        """Fills ``tensors`` in place, under whatever layout they have. The files' hashes are checked first.

        Each rank reads the bytes of its shards, into them; the ranks share the files' hashes out.

        Args:
            partial: what else the checkpoint holds is left alone (a model without its optimizer).

        Raises:
            UserError: there is no such checkpoint, a file is damaged, or a tensor is missing, left over or of
                another shape; names the first.
        """
        self.wait()
        doing = f"cannot read checkpoint {self.folder / name}"
        team = self._team

        def check() -> set[str]:
            self._check_files(self._folder(name), team.rank, team.size)
            return set(tensors)

        names = team.together(check, doing)
        everywhere = None if partial else set().union(*names)
        opened: list[StoredTensors] = []

        def open_() -> None:
            opened.append(StoredTensors(self._folder(name)))
            wanted = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
            check_fit(opened[0].tensors, wanted, everywhere)

        team.together(open_, doing)
        team.together(lambda: _read(opened[0], tensors), doing)

    def prune(self, keep: int) -> list[str]:
        """Removes all but the newest ``keep``; permanent ones and the latest stay, permanent ones uncounted.

        Returns:
            The names of those removed.

        Raises:
            UserError: one cannot be removed.
        """
        self.wait()
        return self._prune(self._team, keep)

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
        for name, folder in folders_in(self.folder).items():
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

    def _content(self, name: str, meta: Mapping[str, Any]) -> dict[str, Any]:
        """``meta`` as it is now. Raises before anything is written: the name may be none, and the meta no JSON."""
        check_name(name)
        content: dict[str, Any] = json.loads(json.dumps(dict(meta)))
        return content

    def _writing(self, name: str) -> str:
        return f"cannot write checkpoint {self.folder / name}"

    def _planned(self, tensors: Held, doing: str) -> tuple[list[Piece], Plan]:
        """What this rank writes. The plan is kept: most saves are of the same shapes as the one before."""
        held: list[Piece] = []

        def known() -> bool:
            held.extend(pieces_of(tensors))
            return self._plan is not None and self._plan.held == [piece.place for piece in held]

        if not all(self._team.together(known, doing)):
            mine, everything = [piece.place for piece in held], dict[str, list[Place]]()
            places = self._team.to_first(lambda: mine, doing)

            def share() -> list[list[int]]:
                written, found = share_out(places)
                everything.update(found)
                return written

            self._plan = Plan(mine, self._team.from_first(share, doing), everything)
        plan = self._plan
        if plan is None:
            raise RuntimeError("no plan")
        return [held[index] for index in plan.written], plan

    def _write(
        self, team: Team, name: str, pieces: list[Piece], plan: Plan, content: dict[str, Any], permanent: bool
    ) -> None:
        def write(folder: Path) -> FileEntries:
            share = lambda: write_pieces(folder, pieces, team.rank)  # noqa: E731
            return _written(team, folder, share, lambda: plan.everything, self._writing(name))

        write_checkpoint(team, self.folder, name, write, content, permanent)

    def _open_background(self) -> None:
        if self._team.size == 1:
            self._aside = self._team
        elif self._aside.group is None:
            if self._team.group is not None:
                raise RuntimeError("a store of some ranks needs a group of theirs for saves in the background")
            self._aside = Team(background_group())

    def _prune(self, team: Team, keep: int) -> list[str]:
        def remove_old() -> list[str]:
            latest = self.latest()
            passing = [name for name in self.names() if not read_manifest(self._folder(name)).permanent]
            old = [name for name in passing[: max(0, len(passing) - keep)] if name != latest]
            for name in old:
                remove(self._folder(name))
            return old

        return team.on_first(remove_old, f"cannot remove old checkpoints in {self.folder}")

    def _folder(self, name: str) -> Path:
        folders = folders_in(self.folder)
        if name not in folders:
            have = ", ".join(self.names()[-3:]) or "none"
            raise UserError(f"no checkpoint {name} in {self.folder} (newest: {have})")
        return folders[name]

    def _check_files(self, folder: Path, share: int, shares: int) -> None:
        """Compares sizes of all files and hashes of every ``shares``-th."""
        manifest = check_sizes(folder)
        for file in sorted(manifest.files)[share::shares]:
            check_hash(folder, manifest, file)


def _written(
    team: Team,
    folder: Path,
    write: Callable[[], Share],
    everything: Callable[[], Mapping[str, list[Place]]],
    doing: str,
) -> FileEntries:
    """Has every rank write its share and rank 0 what describes them; returns the files that are hashed."""
    mine: list[Share] = []

    def files() -> FileEntries:
        mine.append(write())
        return mine[0].files

    hashed = {file: entry for share in team.together(files, doing) for file, entry in share.items()}
    results = team.to_first(lambda: mine[0].results, doing)
    team.on_first(lambda: write_metadata(folder, everything(), results), doing)
    return hashed


def _read(stored: StoredTensors, tensors: Held) -> None:
    for piece in pieces_of(tensors):
        stored.read_into(piece.name, piece.bounds, piece.values)
