"""Files of numbers: lines of JSON that survive a kill, whole JSON files, TensorBoard events."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from elle_mp.data.files import file_errors, write_whole


class JsonLines:
    """A file with one JSON object a line, only ever appended to.

    A number that is not finite becomes ``null``: the standard has no NaN and no Infinity.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds one whole line.

        Raises:
            UserError: it cannot be written (full disk, read-only).
        """
        with file_errors("write", self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(_json(dict(record)) + "\n")

    def truncate_after(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Keeps the lines that ``keep`` accepts; one torn by a kill goes, too. Written beside and renamed.

        Raises:
            UserError: the file cannot be read or written.
        """
        if not self.path.is_file():
            return
        with file_errors("read", self.path):
            before = self.path.read_bytes()
        records = ((line, _parsed(line)) for line in before.split(b"\n"))
        kept = b"".join(line + b"\n" for line, record in records if record is not None and keep(record))
        if kept != before:
            write_whole(self.path, kept)


def _json(content: Any, indent: int | None = None) -> str:
    """JSON that every reader takes."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return content


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file whole or not at all; a number that is not finite becomes ``null``.

    Raises:
        UserError: it cannot be written (full disk, read-only).
    """
    write_whole(path, (_json(content, indent=1) + "\n").encode())


class TensorBoardWriter:
    """Scalars as TensorBoard events; steps from ``purge_step`` on of an earlier process are hidden."""

    def __init__(self, folder: Path, purge_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here, since not every run wants it

        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Adds one point to each curve, and has it on the disk: what a checkpoint covers must not be lost."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Writes what is still in memory."""
        self._writer.close()
