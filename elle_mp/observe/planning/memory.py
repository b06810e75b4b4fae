"""Bytes of each kind on the heaviest rank of every pipeline stage."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, prod

from elle_mp.models.pipeline import stage_of
from elle_mp.observe.planning.activations import head_working_bytes, recomputed_bytes, stage_bytes
from elle_mp.observe.planning.schedules import most_kept
from elle_mp.observe.planning.setting import Setting
from elle_mp.parallel.deepspeed import LIVE_BUCKETS, bucket_size

STEP_BYTES = 4
"""Adam's step count of a parameter, one fp32 number."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank. Those of the masters and the optimizer are exact, the others the peak of a step by formula.

    Attributes:
        parameters: numbers of the masters that it holds.
        host: optimizer state in the host's memory (``parallel.offload``).
        gathered: parameters in the computation's type, gathered or copied.
        activations: kept for backward passes, of all micro-batches that wait for theirs.
        buffers: what a collective is about to send or has received.
        working: what exists for a moment: the loss's logits and table gradient, or a layer's recomputed activations.
        waiting: micro-batches of each of the rank's stages at the peak.
    """

    parameters: int
    masters: int
    optimizer: int
    host: int
    gradients: int
    gathered: int
    activations: int
    buffers: int
    working: int
    waiting: tuple[int, ...]

    @property
    def total(self) -> int:
        """Of the device."""
        parts = (self.masters, self.optimizer, self.gradients, self.gathered)
        return sum(parts) + self.activations + self.buffers + self.working


@dataclass(frozen=True)
class Numbers:
    """Parameters of some modules on a rank, counted.

    Attributes:
        whole: of a tensor-parallel rank, as FSDP2 gathers them: rows padded to divide over the shards.
        mine: of the heaviest shard.
        tensors: parameters.
    """

    whole: int = 0
    mine: int = 0
    tensors: int = 0

    def __add__(self, other: Numbers) -> Numbers:
        return Numbers(self.whole + other.whole, self.mine + other.mine, self.tensors + other.tensors)


def numbers_of(setting: Setting, names: Iterable[str]) -> Numbers:
    """The count of some parameters."""
    total = Numbers()
    for name in names:
        spec = setting.specs[name]
        shape = list(spec.shape(setting.spec.axes))
        if spec.tensor_parallel_dim is not None:
            shape[spec.tensor_parallel_dim] //= setting.tp
        chunk = ceil(shape[0] / setting.shard)
        rest = prod(shape[1:])
        total += Numbers(chunk * setting.shard * rest, chunk * rest, 1)
    return total


def most_live(setting: Setting) -> int:
    """Gathered numbers that DeepSpeed's stage 3 keeps for the next use."""
    return LIVE_BUCKETS * bucket_size([numbers_of(setting, [name]).whole for name in setting.specs])


def units_of(setting: Setting, rank: int) -> tuple[Numbers, list[Numbers]]:
    """What a pipeline rank gathers at a time: the parameters outside of layers, and those of each layer."""
    mine = setting.stages_of(rank)
    layers: dict[str, list[str]] = {}
    root: list[str] = []
    for name in setting.specs:
        if stage_of(name, setting.parts) not in mine:
            continue
        if name.startswith("layers."):
            layers.setdefault(name.split(".")[1], []).append(name)
        else:
            root.append(name)
    numbers = numbers_of(setting, root)
    if setting.spec.tied and len(setting.parts) - 1 in mine and not setting.parts[-1].first:
        numbers += numbers_of(setting, ["token_table"])  # the last stage's copy
    return numbers, [numbers_of(setting, names) for names in layers.values()]


def rank_memory(setting: Setting, rank: int) -> Memory:
    """The bytes of a pipeline rank (its heaviest shard, tensor-parallel rank 0)."""
    root, layers = units_of(setting, rank)
    total = sum(layers, root)
    mine = setting.stages_of(rank)
    activations, waiting = most_kept(setting, rank, [stage_bytes(setting, stage) for stage in mine])
    state = _deepspeed(setting, total) if setting.parallel.engine == "deepspeed" else _fsdp(setting, root, layers)
    return Memory(
        parameters=state["numbers"],
        masters=state["masters"],
        optimizer=state["optimizer"],
        host=state["host"],
        gradients=state["gradients"],
        gathered=state["gathered"],
        activations=activations,
        buffers=state["buffers"] + _pipeline_buffers(setting, rank),
        working=_working(setting, mine),
        waiting=waiting,
    )


def _fsdp(setting: Setting, root: Numbers, layers: list[Numbers]) -> dict[str, int]:
    total, largest = sum(layers, root), max((item.whole for item in layers), default=0)
    reshard = setting.parallel.reshard_after_forward and setting.shard > 1
    if reshard:
        gathered = root.whole + min(2, len(layers)) * largest  # the layer at work and the next one
    else:
        gathered = total.whole  # copies of the masters, on a single rank, too
    # Micro-batches but the last add up whole gradients, in the masters' type; a layer's shards replace them.
    alone = setting.micro_batches == 1
    gradients = (total.mine if alone else total.whole) * setting.master
    widest = max(largest, root.whole)
    buffers = widest * (setting.compute + setting.master) if setting.shard * setting.replicas > 1 else 0
    if alone:
        buffers += widest * setting.compute
    return {
        "numbers": total.mine,
        "masters": total.mine * setting.master,
        "optimizer": 2 * total.mine * setting.master + total.tensors * STEP_BYTES,
        "host": 0,
        "gradients": gradients,
        "gathered": gathered * setting.compute,
        "buffers": buffers,
    }


def _deepspeed(setting: Setting, total: Numbers) -> dict[str, int]:
    """ZeRO (Rajbhandari et al., arXiv 1910.02054, section 5): parameters and gradients in the computation's type,
    masters and moments in the masters', what the stage names cut over the data-parallel ranks."""
    ranks, stage = setting.shard * setting.replicas, setting.parallel.zero_stage
    whole = total.whole
    share = ceil(whole / ranks)
    state = 3 * share * setting.master
    bucket = most_live(setting) // LIVE_BUCKETS
    offload = setting.parallel.offload
    return {
        "numbers": share,
        "masters": 0 if offload else share * setting.master,
        "optimizer": 0 if offload else 2 * share * setting.master,
        "host": state if offload else 0,
        "gradients": (whole if stage == 1 else share) * setting.master,
        "gathered": (share + min(whole, LIVE_BUCKETS * bucket) if stage == 3 else whole) * setting.compute,
        # The bucket that gradients are reduced in, as they come and in the type of the reduction.
        "buffers": bucket * (setting.compute + setting.master),
    }


def _pipeline_buffers(setting: Setting, rank: int) -> int:
    """What ``torch.distributed.pipelining`` allocates once for all micro-batches: hidden states that will arrive from
    the stage before, and gradients from the stage behind."""
    if setting.parallel.pp == 1:
        return 0
    hidden = setting.positions_between * setting.spec.embed * setting.compute
    parts = [setting.parts[stage] for stage in setting.stages_of(rank)]
    return sum(int(not part.first) + int(not part.last) for part in parts) * setting.micro_batches * hidden


def _working(setting: Setting, stages: tuple[int, ...]) -> int:
    layers = [layer for stage in stages for layer in setting.parts[stage].layers]
    moments = [recomputed_bytes(setting, layer in setting.spec.gated) for layer in layers]
    if any(setting.parts[stage].last for stage in stages):
        moments.append(head_working_bytes(setting))
    return max(moments)
