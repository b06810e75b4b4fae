"""The run directory: made or recognised, with the resolved configuration in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from elle_mp.config import Config
from elle_mp.errors import UserError

MAY_CHANGE = ("run.dir", "checkpoint", "parallel", "log", "batch.micro")
"""What may differ when a run goes on: it changes neither the samples nor the function that is learned."""


def open_run_directory(config: Config) -> Path:
    """Makes the run directory, or checks that the one there belongs to this configuration; writes ``config.yaml``.

    Raises:
        UserError: it cannot be written, or it holds a run of another configuration (the first differing key is named).
    """
    folder = Path(config.run.dir)
    tree = config.model_dump(mode="json", by_alias=True)
    saved = folder / "config.yaml"
    try:
        if saved.is_file():
            before = yaml.safe_load(saved.read_text(encoding="utf-8"))
            difference = next(_differences(before, tree, ""), None)
            if difference is not None:
                key, old, new = difference
                raise UserError(
                    f"{folder} holds a run with {key}={old}, not {new}; give run.dir another folder, "
                    "or the same value to go on with that run"
                )
        elif folder.exists() and not folder.is_dir():
            raise UserError(f"run.dir: {folder} is a file; give a folder")
        elif folder.exists() and any(folder.iterdir()):
            raise UserError(f"run.dir: {folder} is not empty and holds no run; give another folder")
        folder.mkdir(parents=True, exist_ok=True)
        beside = folder / f".config.yaml.{os.getpid()}"
        beside.write_text("# The resolved configuration of this run.\n" + yaml.safe_dump(tree, sort_keys=False))
        os.replace(beside, saved)
    except OSError as error:
        raise UserError(
            f"run.dir: {folder} cannot be written ({error.strerror}); give run.dir another folder"
        ) from None
    return folder


def _differences(before: Any, after: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    plain = ".".join(part for part in key.split(".") if not part.isdigit()).removeprefix("stream.")
    if any(plain == name or plain.startswith(f"{name}.") for name in MAY_CHANGE):
        return
    if isinstance(before, dict) and isinstance(after, dict):
        for name in {**before, **after}:
            yield from _differences(before.get(name), after.get(name), f"{key}.{name}".lstrip("."))
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from _differences(one, other, f"{key}.{index}")
    elif before != after:
        yield key, _brief(before), _brief(after)


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
