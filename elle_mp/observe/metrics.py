"""Files of numbers: lines of JSON that survive a kill, whole JSON files, TensorBoard events."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from elle_mp.data.files import file_errors, write_whole


class JsonLines:
    """A file with one JSON object a line, only ever appended to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds one whole line.

        Raises:
            UserError: it cannot be written (full disk, read-only).
        """
        with file_errors("write", self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(record)) + "\n")

    def truncate_after(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Keeps the lines that ``keep`` accepts; a line torn by a kill goes, too. Written beside and renamed."""
        if not self.path.is_file():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if (record := _parsed(line)) is not None and keep(record)]
        if kept != lines:
            write_whole(self.path, "".join(f"{line}\n" for line in kept).encode())


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file whole or not at all."""
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())


class TensorBoardWriter:
    """Scalars as TensorBoard events; steps from ``purge_step`` on of an earlier process are hidden."""

    def __init__(self, folder: Path, purge_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Adds one point to each curve."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what is still in memory."""
        self._writer.close()
