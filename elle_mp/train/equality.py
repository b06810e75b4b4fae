"""Checks that what several ranks hold alike is the same to the last bit: replicas, and both ends of a tied table.

A rank whose memory, kernels or program is at fault trains on without an error, and its replica drifts. Ranks compare a
checksum of 64 bits for each tensor, not the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from elle_mp.errors import UserError
from elle_mp.models.pipeline import tied_ends
from elle_mp.parallel.agreement import disagreement
from elle_mp.parallel.flight_recorder import ranks_of
from elle_mp.parallel.sharding import local_tensor
from elle_mp.train.deepspeed import ZeroAdamW
from elle_mp.train.optimizer import ShardedAdamW

BLOCK = 1 << 20
"""Entries whose bits are widened at a time."""
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
LEAST = torch.iinfo(torch.int64).min

Held = Mapping[str, Tensor]
"""Tensors by what they are called in a message."""


@dataclass(frozen=True)
class Alike:
    """Tensors that should be the same on all ranks of a group.

    Attributes:
        over: how the message calls the group.
        held: what this rank has of them: one set, two when it has both ends of a tied table, or none.
    """

    over: str
    group: dist.ProcessGroup
    held: Sequence[Held]


class EqualityCheck:
    """``parallel.check_every`` of a run: when to check."""

    def __init__(self) -> None:
        self._checked_at = -1

    def __call__(self, optimizer: ShardedAdamW, step: int, always: bool = False) -> None:
        """:func:`check_equal` when it is due; ``always``: before a checkpoint, so that none keeps what has drifted."""
        every = optimizer.grid.parallel.check_every
        if every and (always or step % every == 0) and self._checked_at != step:
            check_equal(optimizer, step)
            self._checked_at = step


def check_equal(optimizer: ShardedAdamW, step: int) -> None:
    """Compares what is repeated on several ranks. Collective over the ranks with a place.

    Args:
        step: for the message.

    Raises:
        UserError: on the ranks that should hold the same and do not; names the tensor, the axis and the ranks.
    """
    for alike in _alike(optimizer):
        _compare(alike, step, optimizer.grid.device)


def _alike(optimizer: ShardedAdamW) -> list[Alike]:
    grid, state = optimizer.grid, _state(optimizer)
    whole = {key for key in optimizer.shards if optimizer.specs[_name(key)].tensor_parallel_dim is None}
    stats = {} if optimizer.model.norm_stats is None else {"norm_stats": optimizer.model.norm_stats}
    found = [Alike(f"parallel.{axis}", grid.group(axis), [stats]) for axis in ("shard", "pp") if grid.size(axis) > 1]
    if grid.tp_size > 1:
        found.append(Alike("parallel.tp", grid.group("tp"), [_called(state, whole) | stats]))
    if isinstance(optimizer, ZeroAdamW):
        found.append(Alike("data-parallel ranks", optimizer.group, [_computed(optimizer) | stats]))
        return found
    if grid.size("dp_replicate") > 1:
        everything = _called(state, set(optimizer.shards))
        found.append(Alike("parallel.dp_replicate", grid.group("dp_replicate"), [everything | stats]))
    if grid.pipeline_stages > 1 and optimizer.model.spec.tied:
        ends = tied_ends(optimizer.model) or (False, False, 0)
        names = [name for name, here in zip(("token_table", "output_table"), ends, strict=False) if here]
        # Both under one name, so that they can be compared.
        tables = [_called({what: {"token_table": item[name]} for what, item in state.items()}) for name in names]
        found.append(Alike("parallel.pp", grid.group("pp"), tables))
    return found


def _state(optimizer: ShardedAdamW) -> dict[str, dict[Any, Tensor]]:
    """What this rank trains, by kind and by parameter (or, under DeepSpeed, by piece of one)."""
    moments = optimizer.moments
    return {
        "": dict(optimizer.shards),
        "step count of ": {key: item.step for key, item in moments.items()},
        "first moment of ": {key: item.first for key, item in moments.items()},
        "second moment of ": {key: item.second for key, item in moments.items()},
    }


def _called(state: Mapping[str, Mapping[Any, Tensor]], keys: set[Any] | None = None) -> dict[str, Tensor]:
    return {
        f"{what}{_name(key)}{f', piece {key[1]}' * isinstance(key, tuple)}": item
        for what, items in state.items()
        for key, item in items.items()
        if keys is None or key in keys
    }


def _name(key: object) -> str:
    return str(key[0] if isinstance(key, tuple) else key)


def _computed(optimizer: ZeroAdamW) -> dict[str, Tensor]:
    """What ZeRO leaves whole on every data-parallel rank: the parameters, unless it shards them, too."""
    if optimizer.grid.parallel.zero_stage == 3:
        return {}
    return {name: item.detach() for name, item in optimizer.model.named_parameters()}


@torch.no_grad()
def _compare(alike: Alike, step: int, device: torch.device) -> None:
    sums = [_checksums(held, device) for held in alike.held]
    count = torch.tensor(max(map(len, sums), default=0), device=device)
    dist.all_reduce(count, dist.ReduceOp.MAX, alike.group)
    # The largest and, by the complement, the smallest; a rank that holds none of it changes neither.
    extremes = torch.full((2, int(count)), LEAST, dtype=torch.int64, device=device)
    for values in sums:
        torch.maximum(extremes, torch.stack([values, ~values]), out=extremes)
    dist.all_reduce(extremes, dist.ReduceOp.MAX, alike.group)
    if bool((extremes[0] == ~extremes[1]).all()):
        return
    wrong = (extremes[0] != ~extremes[1]).nonzero().flatten().tolist()
    mine = [(list(held)[wrong[0]], int(values[wrong[0]])) for held, values in zip(alike.held, sums, strict=True)]
    everyones: list[list[tuple[str, int]]] = [[] for _ in range(dist.get_world_size(alike.group))]
    dist.all_gather_object(everyones, mine, group=alike.group)
    found = [(rank, *item) for rank, items in zip(ranks_of(alike.group), everyones, strict=True) for item in items]
    more = f" and {len(wrong) - 1} other tensors" if len(wrong) > 1 else ""
    ranks, theirs = [rank for rank, *_ in found], [value for *_, value in found]
    who = f"the copies on rank {ranks[0]} differ" if len(set(ranks)) == 1 else disagreement(theirs, ranks)
    raise UserError(
        f"after step {step} {found[0][1]}{more} is not the same over {alike.over}: {who}; memory, a kernel or the "
        "program is at fault there. The last checkpoint is intact: run the same command again to go on from it"
    )


def _checksums(held: Held, device: torch.device) -> Tensor:
    """``[N]`` int64, one of each tensor."""
    if not held:
        return torch.zeros(0, dtype=torch.int64, device=device)
    return torch.stack([checksum(local_tensor(item)).to(device) for item in held.values()])


def checksum(values: Tensor) -> Tensor:
    """The bits of each entry times an odd number of its own, summed modulo 2^64: no single entry can change unseen.

    Returns:
        A scalar, int64.
    """
    bits = values.detach().reshape(-1).view(BITS[values.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for start in range(0, len(bits), BLOCK):
        block = bits[start : start + BLOCK].to(torch.int64)
        odd = torch.arange(2 * start + 1, 2 * (start + len(block)), 2, device=values.device)
        total += (block * odd).sum()  # not in place: fp64's bits are no copy
    return total
