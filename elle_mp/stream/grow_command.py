"""``elle-mp grow``: plans, writes and proves the growth of a stored checkpoint."""

from __future__ import annotations

import difflib
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from rich.console import Console

from elle_mp.checkpoint.offline import OfflineGrowth, grow_checkpoint
from elle_mp.checkpoint.store import CheckpointStore
from elle_mp.checkpoint.stream_reader import StoredTensors
from elle_mp.config import Config, GrowConfig, ModelConfig
from elle_mp.config_file import checked_growth, overridden_config
from elle_mp.data.files import write_whole
from elle_mp.errors import UserError
from elle_mp.growth.layout import Layout, OldParameters, received_bytes
from elle_mp.growth.plan import GrowthPlan, make_plan
from elle_mp.models.declarations import declarations
from elle_mp.models.spec import ModelSpec, sizes_of
from elle_mp.observe.progress import byte_progress
from elle_mp.observe.tables import make_console, plan_table
from elle_mp.parallel.agreement import on_first_rank, on_first_rank_then_all
from elle_mp.parallel.mesh import start_distributed
from elle_mp.stream.evaluate_command import find_checkpoint, run_config
from elle_mp.stream.growth_record import parameters_in, plan_record
from elle_mp.stream.offline_proof import prove_offline
from elle_mp.stream.run_directory import CONFIG, HEADER
from elle_mp.stream.state import BEGIN, DONE, RunState

SETTINGS = ("growth", "parallel")
BLOCKS_IN_MEMORY = 8
"""Old and new block, their indices and scales, noise, and what is on its way to the file."""
LARGEST_BLOCK = 256 << 20
SMALLEST_BLOCK = 1 << 20


@dataclass(frozen=True)
class Options:
    """What the command line says besides the sizes."""

    dry_run: bool
    verify: bool
    max_memory: str


@dataclass(frozen=True)
class Request:
    """A growth that was asked for, checked.

    Attributes:
        run_dir, name: of the old checkpoint.
        config: of its run, with the command's settings.
        meta: of the old checkpoint.
        plan: of the growth.
    """

    run_dir: Path
    name: str
    config: Config
    meta: dict[str, Any]
    plan: GrowthPlan


def grow_command(checkpoint: Path, arguments: Sequence[str], options: Options) -> None:
    """Grows a checkpoint into a new run directory, block by block, and proves it when asked to.

    Raises:
        UserError: no checkpoint there, sizes or strategies that cannot be, or a file that cannot be read or written.
    """
    out, items = _split(arguments)
    if out is None and not options.dry_run:
        raise UserError("grow: OUT is missing; give a new run directory after the checkpoint, or --dry-run")
    limit = _bytes(options.max_memory)
    start_distributed()
    console = make_console(dist.get_rank() == 0)
    try:
        request = on_first_rank_then_all(lambda: _request(checkpoint, items))
        _show(request, console)
        if out is None or options.dry_run:
            return
        on_first_rank(lambda: _open(request, out))
        source = StoredTensors(request.run_dir / "checkpoints" / request.name)
        seconds, written = _write(request, source, out, limit, console)
        console.print(f"wrote {written / 1e9:.2f} GB in {seconds:.1f} s: {out}")
        if options.verify:
            prove_offline(request.config, request.run_dir, request.meta, source, out, limit, console)
    finally:
        dist.destroy_process_group()


def _split(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """OUT and the ``key=value`` items."""
    items = [item for item in arguments if "=" in item]
    paths = [item for item in arguments if "=" not in item]
    if len(paths) > 1:
        raise UserError(f"grow: {paths[1]!r} is neither OUT, which is {paths[0]!r}, nor key=value")
    return (Path(paths[0]) if paths else None), items


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", text.strip().lower())
    if match is None:
        raise UserError(f"--max-memory {text}: give a size, for example 4G or 800M")
    return int(float(match[1]) * 1024 ** " kmgt".index(match[2] or " "))


def _request(checkpoint: Path, items: Sequence[str]) -> Request:
    run_dir, name = find_checkpoint(checkpoint)
    meta = CheckpointStore(run_dir / "checkpoints").meta(name)
    config = run_config(run_dir)
    sizes, settings = _sizes(items)
    if settings:
        config = overridden_config(config, settings)
    spec, state = ModelSpec.from_json(meta["model"]), RunState.from_json(meta["state"])
    current = _model_config(spec, config, state)
    if sizes.model_fields_set:
        target = checked_growth(current, sizes, lambda place: "elle-mp", ("grow",))
    else:
        target = _next_stage(config, state)
    return Request(run_dir, name, config, meta, make_plan(spec, target, config.growth, config.run.seed))


def _sizes(items: Sequence[str]) -> tuple[GrowConfig, list[str]]:
    """The sizes that are asked for, and what is a setting of the configuration."""
    sizes: dict[str, int] = {}
    settings = []
    for item in items:
        key, _, raw = item.partition("=")
        if key.split(".")[0] in SETTINGS and "." in key:
            settings.append(item)
            continue
        if key not in GrowConfig.model_fields:
            known = [*GrowConfig.model_fields, *(f"{name}.KEY" for name in SETTINGS)]
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(known)}"
            raise UserError(f"grow: {item}: there is no size {key!r}; {hint}")
        if not raw.isdigit() or int(raw) == 0:
            raise UserError(f"grow: {item}: give a whole number above 0")
        sizes[key] = int(raw)
    return GrowConfig.model_validate(sizes), settings


def _model_config(spec: ModelSpec, config: Config, state: RunState) -> ModelConfig:
    """The sizes of the stored model as a configuration: that of its stage, unless it has been grown offline."""
    stage = max(state.stage - (state.phase in (BEGIN, DONE)), 0)
    model = config.stage_model(stage)
    if all(getattr(spec, key) == value for key, value in sizes_of(model).items()):
        return model
    fields = model.model_dump() | {
        "layers": spec.layers,
        "heads": spec.heads,
        "kv_groups": spec.kv_groups if spec.family == "llama" else None,
        "head_dim": spec.head_dim,
        "width": spec.embed,
        "mlp": spec.mlp,
        "mlp_ratio": None,
        "seq_len": spec.positions,
        "vocab": spec.vocab_size if spec.vocab_size != spec.softmax_vocab else None,
    }
    return ModelConfig.model_validate(fields)


def _next_stage(config: Config, state: RunState) -> ModelConfig:
    if state.phase != BEGIN or state.stage >= len(config.stream):
        raise UserError(
            "grow: no sizes given, and the checkpoint does not stand before a next stage; give layers=, heads=, ..."
        )
    return config.stage_model(state.stage)


def _show(request: Request, console: Console) -> None:
    """The plan as a table."""
    plan, parallel = request.plan, request.config.parallel
    specs = declarations(plan.old)
    old = OldParameters(specs, {name: spec.shape(plan.old.axes) for name, spec in specs.items()})
    layout = Layout(parallel.tp, parallel.dp_shard)
    growth = OfflineGrowth(plan, StoredTensors(request.run_dir / "checkpoints" / request.name), declarations(plan.new))
    console.print(
        plan_table(
            plan_record(plan, parameters_in(plan.old), parameters_in(plan.new)),
            {"tp": layout.tp, "dp_shard": layout.dp_shard},
            received_bytes(growth.growths, old, layout),
        )
    )


def _open(request: Request, out: Path) -> None:
    """Makes OUT a run directory: the configuration of the run, its tokenizer, and no checkpoint yet."""
    if out.resolve() == request.run_dir.resolve():
        raise UserError(f"grow: {out} is the run of the checkpoint itself; give a new folder")
    if out.is_file():
        raise UserError(f"grow: {out} is a file; give a new folder")
    begun = (out / CONFIG).is_file() and not CheckpointStore(out / "checkpoints").names()
    if out.is_dir() and any(out.iterdir()) and not begun:
        raise UserError(f"grow: {out} is not empty; give a new folder")
    tree = request.config.model_dump(mode="json", by_alias=True)
    tree["run"]["dir"] = str(out)
    tree["parallel"] = run_config(request.run_dir).parallel.model_dump(mode="json")
    try:
        out.mkdir(parents=True, exist_ok=True)
        tokenizer = request.run_dir / "tokenizer"
        if tokenizer.is_dir():
            shutil.copytree(tokenizer, out / "tokenizer", dirs_exist_ok=True)
    except OSError as error:
        raise UserError(f"grow: {out} cannot be used ({error.strerror}); give another folder") from None
    write_whole(out / CONFIG, (HEADER + yaml.safe_dump(tree, sort_keys=False)).encode())


def _write(request: Request, source: StoredTensors, out: Path, limit: int, console: Console) -> tuple[float, int]:
    """Writes the grown checkpoint; the seconds it took, and its bytes."""
    began = time.perf_counter()
    growth = OfflineGrowth(request.plan, source, declarations(request.plan.new))
    total = sum(prod(shape) * dtype.itemsize for shape, dtype in growth.tensors().values())
    state = RunState.from_json(request.meta["state"])
    state.growth = plan_record(request.plan, parameters_in(request.plan.old), parameters_in(request.plan.new))
    state.lineage = [*state.lineage, request.plan.to_json()]
    state.growth_step = state.global_step
    meta = request.meta | {"state": state.to_json(), "model": request.plan.new.to_json()}
    with byte_progress(console, "growing", total // dist.get_world_size()) as advance:
        store = CheckpointStore(out / "checkpoints")
        grow_checkpoint(growth, store, f"{request.name}-grown", meta, _block_bytes(limit), advance)
    return time.perf_counter() - began, total


def _block_bytes(limit: int) -> int:
    """The largest block with which the process stays below ``limit`` bytes.

    Raises:
        UserError: the process is larger already.
    """
    held = resident_bytes()
    block = (limit - held) // BLOCKS_IN_MEMORY
    if block < SMALLEST_BLOCK:
        least = -(-(held + BLOCKS_IN_MEMORY * SMALLEST_BLOCK) // (1 << 20))
        raise UserError(f"--max-memory: the program itself takes {held >> 20} MiB; give {least}M or more")
    return min(block, LARGEST_BLOCK)


def resident_bytes() -> int:
    """Memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096
