"""Checks every stage's layout, batch and sizes against each other and the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from elle_mp.config import Config, ParallelConfig, nearest_divisors, nearest_multiples
from elle_mp.errors import UserError


def check_layout(config: Config, world_size: int) -> None:
    """Checks every stage's layout, batch and sizes against the number of ranks.

    Raises:
        UserError: something does not divide; the message says which value would.
    """
    for problem in layout_problems(config, world_size):
        raise UserError(problem)


def layout_problems(config: Config, world_size: int) -> Iterator[str]:
    """Every reason why the stream cannot run on that many ranks, in the order of the stages, a line each."""
    said = set()
    for index in range(len(config.stream)):
        for problem in _stage_problems(config, index, world_size):
            if problem not in said:  # stages share what they do not set themselves
                said.add(problem)
                yield problem


def _stage_problems(config: Config, index: int, world_size: int) -> Iterator[str]:
    stage, layout = config.stream[index], config.stage_parallel(index)
    prefix = f"stream.{index}.parallel" if stage.parallel else "parallel"
    try:
        ranks = data_parallel_replicas(layout, world_size, prefix) * layout.dp_shard
    except UserError as error:
        ranks = None
        yield str(error)
    yield from _sizes(config, index, layout, prefix)
    yield from _pipeline(config, index, layout, prefix)
    yield from _sequence(config, index, layout, prefix)
    yield from _engine(config, layout, prefix)
    if ranks is not None:
        yield from _batch(config, index, layout, ranks, prefix)


def _batch(config: Config, index: int, layout: ParallelConfig, ranks: int, prefix: str) -> Iterator[str]:
    """The batch divides over data-parallel ranks, and that of a rank over micro-batches."""
    batch = config.stage_batch(index)
    where = f"stream.{index}.batch" if config.stream[index].batch else "batch"
    local = batch.global_ // ranks
    if batch.global_ % ranks:
        yield (
            f"{where}.global={batch.global_} does not divide over {ranks} data-parallel ranks; "
            f"{nearest_multiples(ranks, batch.global_)} would"
        )
    elif batch.micro < local and local % batch.micro:
        yield (
            f"{where}.micro={batch.micro} does not divide the {local} sequences of a rank; "
            f"{nearest_divisors(local, batch.micro)} would"
        )
    else:
        yield from _micro_batches(layout, max(local // batch.micro, 1), prefix)


def data_parallel_replicas(layout: ParallelConfig, world_size: int, prefix: str = "parallel") -> int:
    """``dp_replicate`` of a layout over ``world_size`` ranks, ``auto`` resolved."""
    axes = {"tp": layout.tp, "dp_shard": layout.dp_shard, "cp": layout.cp, "pp": layout.pp}
    used = prod(axes.values())
    said = " x ".join(f"{name}={size}" for name, size in axes.items() if size > 1 or name in ("tp", "dp_shard"))
    if layout.dp_replicate == "auto":
        if world_size % used and not (layout.idle_ranks and world_size > used):
            raise UserError(
                f"{prefix}: {said} = {used} ranks do not divide the {world_size} "
                f"that run; start {nearest_multiples(used, world_size)} (torchrun --nproc-per-node)"
            )
        return world_size // used
    wanted = used * layout.dp_replicate
    if wanted > world_size or (wanted < world_size and not layout.idle_ranks):
        instead = "set dp_replicate=auto" + (", or idle_ranks=true" if wanted < world_size else "")
        raise UserError(
            f"{prefix}: {said} x dp_replicate={layout.dp_replicate} = {wanted} ranks, but {world_size} run; "
            f"start {wanted}, or {instead}"
        )
    return layout.dp_replicate


def _sizes(config: Config, index: int, layout: ParallelConfig, prefix: str) -> Iterator[str]:
    """Heads, the MLP and the vocabulary divide over tensor-parallel ranks."""
    model = config.stage_model(index)
    name = "kv_groups" if model.kv_groups else "heads"
    for what, size in (
        (name, model.groups),
        ("mlp", model.mlp_size),
        ("vocab_multiple", model.vocab_multiple),
    ):
        if size % layout.tp:
            yield (
                f"{prefix}.tp={layout.tp} does not divide {what}={size} of {_stage_name(config, index)}; "
                f"{what}={nearest_multiples(layout.tp, size)} or tp={nearest_divisors(size, layout.tp)} would do"
            )


def _stage_name(config: Config, index: int) -> str:
    return f"stage {index} ({config.stream[index].domain})"


def _pipeline(config: Config, index: int, layout: ParallelConfig, prefix: str) -> Iterator[str]:
    """Every pipeline stage has a layer, and a given split is one of this model."""
    layers, stages = config.stage_model(index).layers, layout.pp * layout.stages_per_rank
    of = _stage_name(config, index)
    if layout.pp > 1 and stages > layers:
        yield (
            f"{prefix}: pp={layout.pp} with {layout.schedule} makes {stages} pipeline stages, and {of} has "
            f"layers={layers}; every stage needs one: layers={stages} or more, or a smaller pp"
        )
    if isinstance(layout.split, tuple) and (len(layout.split) != stages or sum(layout.split) != layers):
        yield (
            f"{prefix}.split={list(layout.split)}: {of} wants {stages} numbers that add up to layers={layers}; "
            "leave it out to have them chosen"
        )


def _sequence(config: Config, index: int, layout: ParallelConfig, prefix: str) -> Iterator[str]:
    """Sequences divide over the ranks that share them."""
    model = config.stage_model(index)
    chunks = layout.cp if model.family == "bert" or layout.cp == 1 else 2 * layout.cp
    pieces = chunks * (layout.tp if layout.sequence_parallel else 1)
    if model.seq_len % pieces:
        why = f"cp={layout.cp}" if layout.cp > 1 else ""
        if layout.sequence_parallel:
            why += " and " * bool(why) + f"tp={layout.tp} with sequence_parallel"
        yield (
            f"{prefix}: {why} cut sequences into {pieces} parts, which do not divide seq_len={model.seq_len} of "
            f"{_stage_name(config, index)}; {nearest_multiples(pieces, model.seq_len)} would"
        )


def _micro_batches(layout: ParallelConfig, count: int, prefix: str) -> Iterator[str]:
    """Interleaved schedules go in rounds of as many micro-batches as there are pipeline ranks, or a few more."""
    if layout.pp == 1 or layout.schedule not in ("interleaved_1f1b", "zero_bubble"):
        return
    if count % max(1, count // layout.pp):
        yield (
            f"{prefix}.schedule={layout.schedule}: {count} micro-batches a step do not make equal rounds over "
            f"pp={layout.pp} ranks; {nearest_multiples(layout.pp, count)} would (batch.global, batch.micro)"
        )


def _engine(config: Config, layout: ParallelConfig, prefix: str) -> Iterator[str]:
    """What DeepSpeed cannot run."""
    if layout.cpu_adam == "deepspeed" and not (layout.engine == "deepspeed" and layout.offload):
        yield (
            f"{prefix}.cpu_adam=deepspeed updates what {prefix}.offload=true leaves in the host's memory, which "
            f"{prefix}.engine=deepspeed does; set both, or cpu_adam=torch"
        )
    if layout.engine != "deepspeed":
        return
    wrong = {
        f"{prefix}.pp={layout.pp}": (layout.pp > 1, "it shards a whole model; pp=1"),
        f"{prefix}.idle_ranks=true": (layout.idle_ranks, "it needs all ranks of the job; idle_ranks=false"),
        "precision=fp64": (config.precision == "fp64", "it keeps fp32 masters; precision=fp32"),
    }
    for key, (found, why) in wrong.items():
        if found:
            yield f"{key} does not go with {prefix}.engine=deepspeed: {why} or engine=fsdp would do"
