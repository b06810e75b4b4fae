"""The run directory: made or recognised, with the resolved configuration in it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from elle_mp.checkpoint.store import CheckpointStore
from elle_mp.config import Config
from elle_mp.config_file import parse_config
from elle_mp.data.build import read_json
from elle_mp.data.files import write_whole
from elle_mp.errors import UserError
from elle_mp.observe.metrics import write_json
from elle_mp.stream.state import DONE, RunState

CONFIG = "config.yaml"
HEADER = "# The resolved configuration of this run.\n"

MAY_CHANGE = ("run.dir", "checkpoint", "parallel", "log")
"""What may differ when a run goes on: it changes neither the samples, nor what is evaluated, nor the function that
is learned. (``batch.micro`` is also the size of the batches of evaluation.)"""


def open_run_directory(config: Config) -> Path:
    """Makes the run directory, or checks that the one there belongs to this configuration; writes ``config.yaml``.

    A run that ended before its first step (a mistake in its data, a signal) holds nothing that another
    configuration could spoil, so it is begun anew.

    Raises:
        UserError: it cannot be written, or it holds a run of another configuration (the first differing key is named).
    """
    folder = Path(config.run.dir)
    saved = folder / CONFIG
    try:
        if _is_run(folder):
            if not _check_same(folder, config) and (folder / "tokenizer").is_dir():
                shutil.rmtree(folder / "tokenizer")
        elif folder.exists() and not folder.is_dir():
            raise UserError(f"run.dir: {folder} is a file; give a folder")
        elif folder.exists() and any(not path.name.startswith(f".{saved.name}.") for path in folder.iterdir()):
            raise UserError(f"run.dir: {folder} is not empty and holds no run; give another folder")
        saved.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.dir: {folder} cannot be used ({error.strerror}); give run.dir another folder") from None
    try:
        write_whole(saved, (HEADER + yaml.safe_dump(_tree(config), sort_keys=False)).encode())
    except UserError as error:
        raise UserError(f"run.dir: {error}; give run.dir another folder") from None
    return folder


def finished_state(config: Config) -> RunState | None:
    """The state of the configuration's run if it has reached the end of its stream, None if not.

    Raises:
        UserError: the run is another configuration's.
    """
    folder = Path(config.run.dir)
    if not _is_run(folder):
        return None
    _check_same(folder, config)
    store = CheckpointStore(folder / "checkpoints")
    name = store.latest()
    state = None if name is None else RunState.from_json(store.meta(name)["state"])
    return state if state is not None and state.phase == DONE else None


def restore_results(run_dir: Path, state: RunState) -> None:
    """Writes ``results.json`` if a kill came between the checkpoint of a stage and its results."""
    if state.stages and read_json(run_dir / "results.json") != state.results():
        write_json(run_dir / "results.json", state.results())


def _is_run(folder: Path) -> bool:
    """Whether a run wrote the ``config.yaml`` of a folder (a user's own file of that name is left alone)."""
    saved = folder / CONFIG
    return saved.is_file() and saved.read_bytes().startswith(HEADER.encode())


def _check_same(folder: Path, config: Config) -> bool:
    """Whether the configuration is that of the run in ``folder``; another one is an error when the run has begun."""
    difference = next(_differences(_completed(_read(folder / CONFIG)), _tree(config), ""), None)
    if difference is not None and _has_begun(folder):
        key, old, new = difference
        raise UserError(
            f"{folder} holds a run with {key}={old}, not {new}; give run.dir another folder, "
            "or the same value to go on with that run"
        )
    return difference is None


def _tree(config: Config) -> dict[str, Any]:
    return config.model_dump(mode="json", by_alias=True)


def _completed(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with the defaults of settings that are younger than it: they say what it did without them."""
    try:
        return _tree(parse_config(tree))
    except UserError:
        return tree  # it has keys that this version does not know: named as a difference


def _read(saved: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(saved.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        tree = None
    if not isinstance(tree, dict):
        raise UserError(f"{saved} is damaged: it is no YAML of a run's configuration; give run.dir another folder")
    return tree


def _has_begun(folder: Path) -> bool:
    """Whether something was learned in a run directory: a checkpoint, or a step on its way to the first."""
    checkpoints, metrics = folder / "checkpoints", folder / "metrics.jsonl"
    return (checkpoints.is_dir() and any(checkpoints.iterdir())) or (metrics.is_file() and metrics.stat().st_size > 0)


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
