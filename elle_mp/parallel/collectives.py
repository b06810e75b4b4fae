"""Autograd collectives of tensor, sequence and context parallelism.

Tensor parallelism has Megatron's f and g (Shoeybi et al., arXiv 1909.08053, section 3). Where the sequence is cut
between sub-layers, an all-gather along the sequence takes the place of f, and a reduce-scatter that of g (Korthikanti
et al., arXiv 2205.05198, section 4.2.2). A group of ``None`` is one rank: nothing is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# torch 2.13 has new names for them and warns of the old ones, which torch 2.11 wants.
_gather_into = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
_scatter_into = dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor

Runs = tuple[range, ...]
"""Positions of a sequence: contiguous runs, ascending."""


class _Linear(torch.autograd.Function):
    """A linear map of ``x`` between ranks, and its transpose for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.there, ctx.back = there, back
        return there(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        out: Tensor = _Linear.apply(grad, ctx.back, ctx.there)
        return out, None, None


def copy_to_tp(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """f, which enters a tensor-parallel region: the identity; backward sums the gradients of the ranks' parts."""
    return _between(x, group, _same, _sum)


def reduce_from_tp(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """g, which leaves a tensor-parallel region: the sum of the ranks' parts, on every rank; backward the identity."""
    return _between(x, group, _sum, _same)


def gather_sequence(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Enters a tensor-parallel region from a cut sequence.

    Args:
        x: ``[B, S / n, ...]``, this rank's positions, in the order of the ranks.

    Returns:
        ``[B, S, ...]``. Backward sums the gradients of the ranks' parts and keeps this rank's positions.
    """
    return _between(x, group, _join, _reduce_scatter)


def reduce_scatter_sequence(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Leaves a tensor-parallel region to a cut sequence: this rank's positions of the sum of the ranks' parts.

    Args:
        x: ``[B, S, ...]``, ``S`` divisible by the ``n`` ranks.

    Returns:
        ``[B, S / n, ...]``. Backward gathers the sequence.
    """
    return _between(x, group, _reduce_scatter, _join)


def gather_sequence_whole(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Gathers a cut sequence for what every rank of ``group`` computes in the same way.

    Args:
        x: ``[B, S / n, ...]``.

    Returns:
        ``[B, S, ...]``. All ranks have the same gradient of it: backward keeps this rank's positions.
    """
    return _between(x, group, _join, _own)


def split_sequence(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Cuts a sequence that all ranks of ``group`` have; the pair of :func:`gather_sequence_whole`.

    Args:
        x: ``[B, S, ...]``, ``S`` divisible by the ``n`` ranks.

    Returns:
        ``[B, S / n, ...]``. Backward gathers the gradient.
    """
    return _between(x, group, _own, _join)


def gather_runs(x: Tensor, group: dist.ProcessGroup | None, layout: Sequence[Runs]) -> Tensor:
    """Gathers a sequence of which every rank has some runs (keys and values of context parallelism).

    Args:
        x: ``[B, S / n, ...]``, the positions ``layout[rank]``.
        layout: of each rank of ``group``, the same number of positions.

    Returns:
        ``[B, S, ...]`` in the sequence's order. Backward sums the ranks' gradients of this rank's positions.
    """
    if group is None:
        return x
    out: Tensor = _Linear.apply(x, partial(_join_runs, group, layout), partial(_reduce_scatter_runs, group, layout))
    return out


def gather_linear(x: Tensor, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup) -> Tensor:
    """``F.linear(gather_sequence(x, group), weight, bias)`` that keeps only ``x`` for the backward pass.

    The gathered sequence is gathered again (arXiv 2205.05198, section 4.2.2), while the gradient of the input is
    computed; that of the weight is computed while the former is on its way.

    Args:
        x: ``[B, S / n, D]``.
        weight: ``[N, D]``, this rank's rows.

    Returns:
        ``[B, S, N]``.
    """
    out: Tensor = _GatherLinear.apply(x, weight, bias, group)
    return out


class _GatherLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.biased = group, bias is not None
        return F.linear(_join(group, x), weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        joining = _Joining(ctx.group, x)
        d_inputs = grad @ weight
        inputs = joining.finish()
        scattering = _ReduceScattering(ctx.group, _parts(d_inputs, dist.get_world_size(ctx.group)))
        rows = grad.flatten(0, 1)
        d_weight = rows.t() @ inputs.flatten(0, 1)
        d_bias = rows.sum(0) if ctx.biased else None
        return scattering.finish(), d_weight, d_bias, None


def _between(
    x: Tensor,
    group: dist.ProcessGroup | None,
    there: Callable[..., Tensor],
    back: Callable[..., Tensor],
) -> Tensor:
    if group is None:
        return x
    out: Tensor = _Linear.apply(x, partial(there, group), partial(back, group))
    return out


def _same(_: dist.ProcessGroup, x: Tensor) -> Tensor:
    return x.view_as(x)


def _sum(group: dist.ProcessGroup, x: Tensor) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


def _own(group: dist.ProcessGroup, x: Tensor) -> Tensor:
    """This rank's positions of ``[B, S, ...]``; a copy, so that the rest need not be kept."""
    part = x.chunk(dist.get_world_size(group), dim=1)[dist.get_rank(group)]
    return part.clone(memory_format=torch.contiguous_format)


def _join(group: dist.ProcessGroup, x: Tensor) -> Tensor:
    return _Joining(group, x).finish()


def _reduce_scatter(group: dist.ProcessGroup, x: Tensor) -> Tensor:
    return _ReduceScattering(group, _parts(x, dist.get_world_size(group))).finish()


def _join_runs(group: dist.ProcessGroup, layout: Sequence[Runs], x: Tensor) -> Tensor:
    joining = _Joining(group, x)
    gathered = joining.parts()
    out = x.new_empty(x.shape[0], x.shape[1] * len(layout), *x.shape[2:])
    for part, runs in zip(gathered, layout, strict=True):
        for piece, run in zip(part.split([len(run) for run in runs], dim=1), runs, strict=True):
            out[:, run.start : run.stop] = piece
    return out


def _reduce_scatter_runs(group: dist.ProcessGroup, layout: Sequence[Runs], x: Tensor) -> Tensor:
    parts = x.new_empty(len(layout), x.shape[0], x.shape[1] // len(layout), *x.shape[2:])
    for part, runs in zip(parts, layout, strict=True):
        torch.cat([x[:, run.start : run.stop] for run in runs], dim=1, out=part)
    return _ReduceScattering(group, parts).finish()


def _parts(x: Tensor, count: int) -> Tensor:
    """``[B, S, ...]`` as contiguous ``[count, B, S / count, ...]``; no copy of a single sequence."""
    return x.unflatten(1, (count, x.shape[1] // count)).transpose(0, 1).contiguous()


class _Joining:
    """An all-gather of ``x [B, S / n, ...]`` under way."""

    def __init__(self, group: dist.ProcessGroup, x: Tensor) -> None:
        # Kept until the end: it is being read.
        self.source = x.contiguous()
        self.out = x.new_empty(dist.get_world_size(group), *x.shape)
        self.work = _gather_into(self.out.flatten(0, 1), self.source, group=group, async_op=True)

    def parts(self) -> Tensor:
        """``[n, B, S / n, ...]``."""
        self.work.wait()
        return self.out

    def finish(self) -> Tensor:
        """``[B, S, ...]``; one copy, but of a single sequence none."""
        return self.parts().transpose(0, 1).flatten(1, 2)


class _ReduceScattering:
    """A reduce-scatter of ``parts [n, ...]`` under way: rank ``r`` gets the sum of all ``parts[r]``.

    gloo's own is an all-reduce of everything. On the CPU every rank sends its parts to their owners, who add them up
    in the order of the ranks, bf16 in fp32 and rounded once.
    """

    def __init__(self, group: dist.ProcessGroup, parts: Tensor) -> None:
        self.parts = parts
        self.on_cpu = parts.device.type == "cpu"
        if self.on_cpu:
            self.out = torch.empty_like(parts)
            self.work = dist.all_to_all_single(self.out, parts, group=group, async_op=True)
        else:
            self.out = parts.new_empty(parts.shape[1:])
            self.work = _scatter_into(self.out, parts.flatten(0, 1), group=group, async_op=True)

    def finish(self) -> Tensor:
        """``[...]``, one part."""
        self.work.wait()
        if not self.on_cpu:
            return self.out
        return self.out[0] + self.out[1] if len(self.out) == 2 else self.out.sum(0)
