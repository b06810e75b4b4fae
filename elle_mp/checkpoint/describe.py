"""What a checkpoint is, for people and programs."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from elle_mp.checkpoint.consolidate import MODEL
from elle_mp.checkpoint.manifest import META, check_sizes
from elle_mp.checkpoint.store import CheckpointStore
from elle_mp.checkpoint.stream_reader import StoredTensors
from elle_mp.errors import UserError
from elle_mp.growth.plan import GrowthPlan
from elle_mp.models.spec import ModelSpec

_SIZES = ("layers", "heads", "kv_groups", "head_dim", "embed", "mlp", "positions", "vocab_size")
_POSITION = ("global_step", "stage", "phase", "step", "tokens")


def checkpoint_folder(path: Path) -> Path:
    """The folder of a checkpoint given as itself, or as the run directory whose latest is meant.

    Raises:
        UserError: there is none.
    """
    path = path.resolve() if path.name in ("", "..") else path
    if (path / "checkpoints").is_dir():
        store = CheckpointStore(path / "checkpoints")
        name = store.latest()
        if name is None:
            raise UserError(f"{path}: the run has no complete checkpoint yet")
        return store.folder / name
    if path.is_dir() and (path.parent.name == "checkpoints" or (path / META).is_file()):
        return path
    raise UserError(f"{path}: no checkpoint; give a run directory or RUN/checkpoints/NAME")


def describe(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds, from its manifest and the list of its tensors; no tensor is read.

    Returns:
        Plain values: ``name``, ``folder``, ``permanent``, ``ranks`` that wrote it and their ``layout`` (``None`` where
        it was not noted), ``state`` (the position in the stream), ``model`` (family and sizes), ``parameters`` (entries
        of the model's tensors), ``tensors`` by name with ``shape``, ``dtype`` and ``bytes``, ``bytes`` of all of them,
        ``files`` with ``size`` and ``sha256``, and ``lineage`` (the growths that led to it, oldest first).

    Raises:
        UserError: it is damaged.
    """
    stored = StoredTensors(folder)
    manifest = check_sizes(folder)
    state: Mapping[str, Any] = manifest.meta.get("state", {})
    tensors: dict[str, dict[str, Any]] = {
        name: {"shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "bytes": prod(shape) * dtype.itemsize}
        for name, (shape, dtype) in stored.tensors.items()
    }
    return {
        "name": folder.name,
        "folder": str(folder),
        "permanent": manifest.permanent,
        "ranks": manifest.ranks,
        "layout": manifest.meta.get("layout"),
        "state": {key: state[key] for key in _POSITION if key in state},
        "model": _model(manifest.meta.get("model")),
        "parameters": sum(prod(item["shape"]) for name, item in tensors.items() if name.startswith(MODEL)),
        "tensors": tensors,
        "bytes": sum(item["bytes"] for item in tensors.values()),
        "files": manifest.files,
        "lineage": [_growth(plan) for plan in state.get("lineage", [])],
    }


def _model(fields: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if fields is None:
        return None
    spec = ModelSpec.from_json(fields)
    return {"family": spec.family} | {key: getattr(spec, key) for key in _SIZES}


def _growth(fields: Mapping[str, Any]) -> dict[str, Any]:
    summary = GrowthPlan.from_json(fields).summary()
    return {key: summary[key] for key in ("width", "depth", "moments", "rate", "noise_db", "exact", "from", "to")}
