"""The run directory that an offline growth makes: nobody takes it for a run before it is whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from elle_mp.config import Config, GrowConfig, ModelConfig
from elle_mp.config_file import checked_growth, parse_config
from elle_mp.data.files import write_whole
from elle_mp.errors import UserError
from elle_mp.stream.run_directory import CONFIG, HEADER
from elle_mp.stream.state import DONE, RunState

MARK = "growing.json"
"""In a directory that is being made, or whose making was killed. ``config.yaml``, without which it is no run, comes
last."""

WHERE = "grow: the stages after it"


def open_grown(run_dir: Path, checkpoint: str, out: Path) -> None:
    """Begins ``out``: the tokenizer of ``run_dir``, and nothing that a killed growth has left.

    Raises:
        UserError: it is something else already, lies in the run, or cannot be written.
    """
    if out.resolve() == run_dir.resolve():
        raise UserError(f"grow: {out} is the run of the checkpoint itself; give a new folder")
    if run_dir.resolve() in out.resolve().parents:
        raise UserError(f"grow: {out} lies in the run of the checkpoint; give a folder outside {run_dir}")
    try:
        if out.exists() and not out.is_dir():
            raise UserError(f"grow: {out} is a file; give a new folder")
        abandon(out)
        if out.is_dir() and any(out.iterdir()):
            raise UserError(f"grow: {out} is not empty; give a new folder")
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / MARK, (json.dumps({"from": str(run_dir), "checkpoint": checkpoint}) + "\n").encode())
        if (run_dir / "tokenizer").is_dir():
            shutil.copytree(run_dir / "tokenizer", out / "tokenizer")
    except (OSError, shutil.Error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"grow: {out} cannot be used ({reason}); give another folder") from None


def close_grown(out: Path, config: Config) -> None:
    """Makes a run directory of it.

    Raises:
        UserError: it cannot be written.
    """
    tree = config.model_dump(mode="json", by_alias=True)
    write_whole(out / CONFIG, (HEADER + yaml.safe_dump(tree, sort_keys=False)).encode())
    (out / MARK).unlink()


def abandon(out: Path) -> None:
    """Removes what a growth has begun in ``out`` and not ended."""
    if (out / MARK).is_file() and not (out / CONFIG).exists():
        for name in ("checkpoints", "tokenizer"):
            shutil.rmtree(out / name, ignore_errors=True)
        (out / MARK).unlink()


def grown_config(config: Config, state: RunState, target: ModelConfig, out: Path) -> Config:
    """The configuration with which the grown checkpoint goes on: the sizes of its stage are ``target``.

    What later stages grow stays, but for sizes that the model has passed already.

    Raises:
        UserError: a later stage cannot follow.
    """
    tree = config.model_dump(mode="json", by_alias=True)
    tree["run"]["dir"] = str(out)
    if state.phase != DONE and target != config.stage_model(state.stage):
        _resize(tree, config, state.stage, target)
    return parse_config(tree, WHERE)


def _resize(tree: dict[str, Any], config: Config, stage: int, target: ModelConfig) -> None:
    before = config.stage_model(max(stage - 1, 0))
    sizes = {key: getattr(target, key) for key in GrowConfig.model_fields}
    changed = {key: value for key, value in sizes.items() if value is not None and value != getattr(before, key)}
    if stage == 0:
        tree["model"] |= changed | ({"mlp_ratio": None} if "mlp" in changed else {})
    else:
        tree["stream"][stage]["grow"] = changed
    model = target
    for index, item in enumerate(tree["stream"][stage + 1 :], stage + 1):
        if item["grow"] is not None:
            item["grow"] = {key: value for key, value in item["grow"].items() if not _passed(value, key, model)}
            place = ("stream", index, "grow")
            model = checked_growth(model, GrowConfig.model_validate(item["grow"]), lambda _: WHERE, place)


def _passed(value: int | None, key: str, model: ModelConfig) -> bool:
    has: Mapping[str, int | None] = model.model_dump() | {
        "kv_groups": model.groups,
        "width": model.embed,
        "mlp": model.mlp_size,
    }
    return value is not None and value < (has[key] or 0)
