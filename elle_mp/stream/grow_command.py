"""``elle-mp grow``: plans, writes and proves the growth of a stored checkpoint."""

from __future__ import annotations

import difflib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console

from elle_mp.checkpoint.offline import OfflineGrowth, grow_checkpoint
from elle_mp.checkpoint.store import CheckpointStore
from elle_mp.checkpoint.stream_reader import StoredTensors
from elle_mp.config import Config, GrowConfig, ModelConfig, nearest_divisors, nearest_multiples
from elle_mp.config_file import checked_growth, overridden_config
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
from elle_mp.stream.grown_directory import abandon, close_grown, grown_config, open_grown
from elle_mp.stream.growth_record import parameters_in, plan_record
from elle_mp.stream.memory import block_bytes, keeper, parse_bytes
from elle_mp.stream.offline_proof import check_proof_memory, prove_offline
from elle_mp.stream.state import BEGIN, DONE, RunState

SETTINGS = ("growth", "parallel")


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
        target: the sizes asked for.
        plan: of the growth.
    """

    run_dir: Path
    name: str
    config: Config
    meta: dict[str, Any]
    target: ModelConfig
    plan: GrowthPlan


def grow_command(checkpoint: Path, arguments: Sequence[str], options: Options) -> None:
    """Grows a checkpoint into a new run directory, block by block, and proves it when asked to.

    Raises:
        UserError: no checkpoint there, sizes or strategies that cannot be, or a file that cannot be read or written.
    """
    out, items = _split(arguments)
    if out is None and not options.dry_run:
        raise UserError("grow: OUT is missing; give a new run directory after the checkpoint, or --dry-run")
    limit = parse_bytes(options.max_memory)
    start_distributed()
    console = make_console(dist.get_rank() == 0)
    try:
        request = on_first_rank_then_all(lambda: _request(checkpoint, items))
        growth = on_first_rank_then_all(lambda: _growth(request, options.verify))
        _show(request, growth, console)
        if out is not None and not options.dry_run:
            _grow(request, growth, out, limit, options.verify, console)
    finally:
        dist.destroy_process_group()


def _grow(request: Request, growth: OfflineGrowth, out: Path, limit: int, verify: bool, console: Console) -> None:
    """Makes OUT, or leaves nothing there. What can be wrong is found before it is touched."""
    layout = run_config(request.run_dir).parallel  # the command's was a question
    config = request.config.model_copy(update={"parallel": layout})
    config = grown_config(config, RunState.from_json(request.meta["state"]), request.target, out)
    block = block_bytes(limit, growth.longest_row)
    if verify:
        check_proof_memory(request.plan, limit)
    on_first_rank(lambda: open_grown(request.run_dir, request.name, out))
    try:
        seconds, written = _write(request, growth, out, (limit, block), console)
        text = f"wrote {written / 1e9:.2f} GB in {seconds:.1f} s: {out}"
        console.print(text, soft_wrap=True, markup=False, emoji=False)
        if verify:
            prove_offline(request.config, request.run_dir, request.meta, growth.source, out, limit, console)
        on_first_rank(lambda: close_grown(out, config))
    except (UserError, KeyboardInterrupt):
        if dist.get_rank() == 0:
            abandon(out)
        raise


def _growth(request: Request, check_hashes: bool) -> OfflineGrowth:
    """The growth of the stored tensors, which fit the plan."""
    source = StoredTensors(request.run_dir / "checkpoints" / request.name, check_hashes and dist.get_rank() == 0)
    growth = OfflineGrowth(request.plan, source, declarations(request.plan.new))
    growth.tensors()
    return growth


def _split(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """OUT and the ``key=value`` items."""
    items = [item for item in arguments if "=" in item]
    paths = [item for item in arguments if "=" not in item]
    if len(paths) > 1:
        raise UserError(f"grow: {paths[1]!r} is neither OUT, which is {paths[0]!r}, nor key=value")
    return (Path(paths[0]) if paths else None), items


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
        target = checked_growth(current, sizes, lambda place: "command line", ("grow",))
    else:
        target = _next_stage(config, state)
    return Request(run_dir, name, config, meta, target, make_plan(spec, target, config.growth, config.run.seed))


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


def _show(request: Request, growth: OfflineGrowth, console: Console) -> None:
    """The plan as a table."""
    plan, parallel = request.plan, request.config.parallel
    specs = declarations(plan.old)
    old = OldParameters(specs, {name: spec.shape(plan.old.axes) for name, spec in specs.items()})
    layout = Layout(parallel.tp, parallel.dp_shard * parallel.cp)
    _check_layout(plan.new, layout)
    console.print(
        plan_table(
            plan_record(plan, parameters_in(plan.old), parameters_in(plan.new)),
            {"tp": layout.tp, "dp_shard": layout.dp_shard},
            received_bytes(growth.growths, old, layout),
        )
    )


def _check_layout(spec: ModelSpec, layout: Layout) -> None:
    """Refuses a layout that cannot hold the larger model."""
    heads = "heads" if spec.kv_groups == spec.heads else "kv_groups"
    for what, size in ((heads, spec.kv_groups), ("mlp", spec.mlp), ("model.vocab_multiple", spec.padded_vocab)):
        if size % layout.tp:
            raise UserError(
                f"grow: parallel.tp={layout.tp} does not divide {what}={size}; "
                f"{what}={nearest_multiples(layout.tp, size)} or tp={nearest_divisors(size, layout.tp)} would do"
            )


def _write(
    request: Request, growth: OfflineGrowth, out: Path, memory: tuple[int, int], console: Console
) -> tuple[float, int]:
    """Writes the grown checkpoint; the seconds it took, and its bytes.

    Args:
        memory: bytes of the process, and of a block.
    """
    keep = keeper(*memory)

    def written(count: int) -> None:
        advance(count)
        keep()

    began = time.perf_counter()
    total = sum(prod(shape) * dtype.itemsize for shape, dtype in growth.tensors().values())
    state = RunState.from_json(request.meta["state"])
    state.growth = plan_record(request.plan, parameters_in(request.plan.old), parameters_in(request.plan.new))
    state.lineage = [*state.lineage, request.plan.to_json()]
    state.growth_step = state.global_step
    meta = request.meta | {"state": state.to_json(), "model": request.plan.new.to_json()}
    with byte_progress(console, "growing", total // dist.get_world_size()) as advance:
        store, name = CheckpointStore(out / "checkpoints"), f"{request.name}-grown"
        grow_checkpoint(growth, store, name, meta, memory[1], written)
    seconds = time.perf_counter() - began
    state.growth["seconds"] = seconds
    on_first_rank(lambda: store.set_meta(name, meta | {"state": state.to_json()}))
    return seconds, total
