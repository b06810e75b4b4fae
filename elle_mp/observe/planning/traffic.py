"""Bytes that a rank sends in one step, by kind.

Counted as the best algorithms send them: of ``n`` ranks each sends ``(n - 1) / n`` of what an all-gather makes or a
reduce-scatter takes, and twice that share of what an all-reduce sums.
"""

from __future__ import annotations

from dataclasses import dataclass

from elle_mp.models.pipeline import stage_of
from elle_mp.observe.planning.memory import Numbers, most_live, numbers_of, units_of
from elle_mp.observe.planning.setting import Setting


@dataclass(frozen=True)
class Traffic:
    """Bytes sent by a rank in a step.

    Attributes:
        tp: activations and their gradients over ``tp``, softmax statistics included.
        dp_gather: parameters over ``dp_shard`` (and ``cp``).
        dp_reduce: gradients over ``dp_shard`` (and ``cp``).
        dp_replicas: gradients over ``dp_replicate``.
        pp: hidden states and their gradients to the neighbouring stages, and the tied table's gradient.
        cp: keys and values, and their gradients.
    """

    tp: int
    dp_gather: int
    dp_reduce: int
    dp_replicas: int
    pp: int
    cp: int

    @property
    def total(self) -> int:
        """Of all kinds."""
        return self.tp + self.dp_gather + self.dp_reduce + self.dp_replicas + self.pp + self.cp


def rank_traffic(setting: Setting, rank: int) -> Traffic:
    """What a pipeline rank sends."""
    root, layers = units_of(setting, rank)
    gather, reduce, replicas = _data_parallel(setting, root, layers)
    return Traffic(
        tp=setting.micro_batches * _tensor_parallel(setting, rank) + _partial_gradients(setting, rank),
        dp_gather=gather,
        dp_reduce=reduce,
        dp_replicas=replicas,
        pp=_pipeline(setting, rank),
        cp=setting.micro_batches * _context_parallel(setting, rank),
    )


def _share(size: int, ranks: int) -> int:
    """Of a buffer of ``size`` bytes, what a rank of an all-gather or reduce-scatter sends."""
    return size * (ranks - 1) // ranks


def _tensor_parallel(setting: Setting, rank: int) -> int:
    """Over ``tp``, of one micro-batch."""
    tp, spec = setting.tp, setting.spec
    if tp == 1:
        return 0
    hidden = _share(setting.positions * spec.embed * setting.compute, tp)
    sent = 0
    for stage in setting.stages_of(rank):
        part = setting.parts[stage]
        sent += sum(hidden * _passes(setting, layer in spec.gated) for layer in part.layers)
        rows = setting.predicted
        if part.first:
            sent += 2 * _share(rows * spec.embed * setting.compute, tp)
        if part.last:
            # The gradient of the rows, and three numbers of each row: its maximum, its sum, its target's logit.
            sent += 2 * _share(rows * (spec.embed * setting.compute + 3 * setting.statistics), tp)
            sent += hidden if setting.parallel.sequence_parallel else 0
    return sent


def _passes(setting: Setting, gated: bool) -> int:
    """Times that one layer sends its share of ``[B, S, D]``: an all-reduce is two, a gather or reduce-scatter one."""
    recompute = setting.parallel.recompute
    if setting.parallel.sequence_parallel:
        # Forward: gather and reduce-scatter of two sub-layers; backward: their transposes, and the gathers again.
        once, passes = 2, 4 + 4 + 2
    else:
        once, passes = 2, 4 + 4
    # Recomputing ends where nothing more is kept: before the last sum, unless what follows wants it.
    wants_last = not setting.spec.pre_norm or setting.spec.dropout > 0 or gated
    if recompute == "full":
        passes += once + (once if wants_last else once // 2 if setting.parallel.sequence_parallel else 0)
    elif recompute == "selective":
        wants_last = not setting.spec.pre_norm or setting.spec.dropout > 0
        passes += once if wants_last else once // 2 if setting.parallel.sequence_parallel else 0
    return passes


def _partial_gradients(setting: Setting, rank: int) -> int:
    """Sequence parallelism: gradients of what every rank holds whole, but sees a part of the positions for."""
    if setting.tp == 1 or not setting.parallel.sequence_parallel:
        return 0
    names = [name for name, spec in setting.specs.items() if spec.tensor_parallel_dim is None]
    mine = setting.stages_of(rank)
    partial = [name for name in names if not name.startswith(("final_norm", "head."))]
    numbers = numbers_of(setting, [name for name in partial if stage_of(name, setting.parts) in mine])
    return 2 * _share(numbers.mine * setting.master, setting.tp)


def _data_parallel(setting: Setting, root: Numbers, layers: list[Numbers]) -> tuple[int, int, int]:
    """Gathers, reduce-scatters and all-reduces of FSDP2 or ZeRO."""
    total, inner = sum(layers, root), sum(layers, Numbers())
    count, shard, replicas = setting.micro_batches, setting.shard, setting.replicas
    if setting.parallel.engine == "deepspeed":
        # Gradients go in fp32, with every micro-batch but where a rank keeps all of them, and by an all-reduce of
        # buckets but in stage 3.
        ranks, stage = shard * replicas, setting.parallel.zero_stage
        gathers = count * (1 if total.whole <= most_live(setting) else 2) if stage == 3 else 1
        reductions = (1 if stage == 1 and setting.compute == setting.master else count) * (1 if stage == 3 else 2)
        size = total.whole * setting.compute
        return gathers * _share(size, ranks), reductions * _share(total.whole * setting.master, ranks), 0
    again = setting.parallel.reshard_after_forward
    # Every micro-batch gathers anew: a backward pass frees what it used.
    gathered = total.whole + (inner.whole if again else 0)
    gather = count * _share(gathered * setting.compute, shard)
    reduce = _share(total.whole * setting.master, shard)
    return gather, reduce, 2 * _share(total.mine * setting.master, replicas)


def _pipeline(setting: Setting, rank: int) -> int:
    hidden = setting.positions_between * setting.spec.embed * setting.compute
    sent, last = 0, len(setting.parts) - 1
    for stage in setting.stages_of(rank):
        for other in (stage - 1, stage + 1):
            if 0 <= other <= last and setting.rank_of_stage(other) != rank:
                sent += setting.micro_batches * hidden
    ends = {setting.rank_of_stage(0), setting.rank_of_stage(last)}
    if setting.spec.tied and len(ends) == 2 and rank in ends:
        spec = setting.spec
        sent += spec.padded_vocab // setting.tp * spec.embed // setting.shard * setting.master
    return sent


def _context_parallel(setting: Setting, rank: int) -> int:
    """Keys and values of one micro-batch: gathered forward, their gradients scattered back."""
    cp, spec = setting.cp, setting.spec
    if cp == 1:
        return 0
    groups = spec.kv_groups // setting.tp
    both = 2 * setting.micro * spec.positions * groups * spec.head_dim * setting.compute
    layers = sum(setting.layers_of(stage) for stage in setting.stages_of(rank))
    passes = 3 if setting.parallel.recompute == "full" else 2
    return layers * passes * _share(both, cp)
