"""Which positions of a sequence a rank holds: context parallelism cuts it first, sequence parallelism cuts the part.

A causal sequence is cut into ``2 * cp`` chunks, and rank ``r`` holds the chunks ``r`` and ``2 * cp - 1 - r``, so that
all ranks have the same number of pairs of query and key (zig-zag: Brandon et al., arXiv 2311.09431; Grattafiori et
al., arXiv 2407.21783, section 3.3.2). Without a causal mask rank ``r`` holds the chunk ``r`` of ``cp``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from elle_mp.axes import ParamSpec
from elle_mp.errors import UserError
from elle_mp.parallel.collectives import Runs
from elle_mp.parallel.mesh import Grid
from elle_mp.parallel.sharding import PartedModule, ShardedModule, local_tensor, named_specs

HEAD = ("final_norm.", "head.")
"""Names of parameters that see gathered sequences begin so."""


@dataclass(frozen=True)
class Positions:
    """Where a rank's hidden states stand in the sequence.

    Attributes:
        length: of the sequence, the prompt included.
        layout: what each context-parallel rank has.
        context: what this rank's attention has queries of, an entry of ``layout``.
        residual: what it holds between sub-layers: ``context``, or a part of it when the sequence is cut over ``tp``.
    """

    length: int
    layout: tuple[Runs, ...]
    context: Runs
    residual: Runs

    @property
    def gathers_keys(self) -> bool:
        """Whether keys and values have to come from other ranks."""
        return len(self.layout) > 1

    @property
    def cut_over_tp(self) -> bool:
        """Whether tensor-parallel ranks hold different positions between sub-layers."""
        return self.residual != self.context

    @property
    def rows(self) -> tuple[int, ...]:
        """The first position of each run between sub-layers; the runs are equally long."""
        return tuple(run.start for run in self.residual)


def positions(grid: Grid, length: int, causal: bool) -> Positions:
    """The positions of this rank.

    Raises:
        UserError: the ranks do not divide the sequence.
    """
    layout = context_layout(length, grid.size("cp"), causal)
    context = residual = layout[grid.rank("cp")]
    if grid.parallel.sequence_parallel:
        residual = part_of(context, grid.tp_rank, grid.tp_size)
    return Positions(length, layout, context, residual)


def context_layout(length: int, ranks: int, causal: bool) -> tuple[Runs, ...]:
    """What each of ``ranks`` context-parallel ranks holds.

    Raises:
        UserError: sequences of this length cannot be cut so.
    """
    chunks = ranks if ranks == 1 or not causal else 2 * ranks
    if length % chunks:
        raise UserError(
            f"parallel.cp={ranks} cuts sequences into {chunks} chunks, which do not divide {length} positions"
        )
    size = length // chunks
    if chunks == ranks:
        return tuple((range(rank * size, (rank + 1) * size),) for rank in range(ranks))
    pairs = ((rank, chunks - 1 - rank) for rank in range(ranks))
    return tuple(_joined(range(a * size, (a + 1) * size), range(b * size, (b + 1) * size)) for a, b in pairs)


def _joined(first: range, second: range) -> Runs:
    """The last rank's chunks lie next to each other."""
    return (range(first.start, second.stop),) if first.stop == second.start else (first, second)


def part_of(runs: Runs, rank: int, ranks: int) -> Runs:
    """The positions of one of ``ranks`` equal parts of ``runs``.

    Raises:
        UserError: the ranks do not divide them.
    """
    count = sum(map(len, runs))
    if count % ranks:
        raise UserError(f"parallel.tp={ranks} with sequence_parallel does not divide the {count} positions of a rank")
    return between(runs, rank * count // ranks, (rank + 1) * count // ranks)


def between(runs: Runs, first: int, end: int) -> Runs:
    """The positions from the ``first``-th to the ``end``-th of ``runs``, counted in their order."""
    out, before = [], 0
    for run in runs:
        part = run[max(first - before, 0) : max(end - before, 0)]
        if len(part):
            out.append(part)
        before += len(run)
    return tuple(out)


def below(runs: Runs, bound: int) -> Runs:
    """Those of the positions that are less than ``bound``."""
    return tuple(range(run.start, min(run.stop, bound)) for run in runs if run.start < bound)


def behind(runs: Runs, bound: int) -> Runs:
    """Those of the positions that are not less than ``bound``, counted from there."""
    return tuple(range(max(run.start, bound) - bound, run.stop - bound) for run in runs if run.stop > bound)


def select(x: Tensor, runs: Sequence[range], dim: int = 1) -> Tensor:
    """The positions ``runs`` of ``x``, a whole sequence along ``dim``; ``x`` itself when that is all of it."""
    if len(runs) == 1 and len(runs[0]) == x.shape[dim]:
        return x
    if not runs:
        return x.narrow(dim, 0, 0)
    return torch.cat([x.narrow(dim, run.start, len(run)) for run in runs], dim)


def whole_length(grid: Grid, local: int) -> int:
    """Positions of a sequence of which a rank holds ``local`` between sub-layers; inverse of ``grid.local_length``."""
    return local * grid.size("cp") * (grid.tp_size if grid.parallel.sequence_parallel else 1)


def partial_parameters(specs: Mapping[str, ParamSpec], grid: Grid) -> list[str]:
    """Parameters whose gradient on a tensor-parallel rank is that of the rank's own positions only, in order.

    With sequence parallelism these are all that are not cut over ``tp``, but for the head's, which sees gathered
    sequences; without it there are none.
    """
    if grid.tp_size == 1 or not grid.parallel.sequence_parallel:
        return []
    return [name for name, spec in specs.items() if spec.tensor_parallel_dim is None and not name.startswith(HEAD)]


@torch.no_grad()
def sum_partial_gradients(model: ShardedModule | PartedModule, grid: Grid) -> None:
    """Completes the gradients of :func:`partial_parameters`, once a step: one collective, on a flat copy of shards."""
    names = partial_parameters(dict(named_specs(model)), grid)
    gradients = [model.get_parameter(name).grad for name in names]
    shards = [local_tensor(gradient) for gradient in gradients if gradient is not None]
    if not shards:
        return
    flat = torch.cat([shard.flatten() for shard in shards])
    dist.all_reduce(flat, group=grid.group("tp"))
    parts = flat.split([shard.numel() for shard in shards])
    torch._foreach_copy_(shards, [part.view(shard.shape) for part, shard in zip(parts, shards, strict=True)])
