"""The last projection and the cross entropy in one op, so that the logits ``[N, V]`` never exist at once.

The gradient is formed in the forward pass, chunk by chunk, while the chunk's logits are still in the cache
(as in Liger Kernel, arXiv 2410.10989, and Cut Cross-Entropy, arXiv 2411.09009).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_CHUNK_BYTES = 16 << 20
"""Logits of one chunk: half of a usual last-level cache."""


def linear_cross_entropy(
    hidden: Tensor,
    table: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Sum over rows of ``-log softmax(hidden @ table.T + bias)[target]``.

    Args:
        hidden: ``[N, D]``, the same on every rank of ``group``.
        table: ``[V_local, D]``, rows ``vocab_start`` onward of the whole table, in the type of ``hidden``.
        targets: int64 ``[N]``, global ids in ``[0, vocab_size)``.
        bias: ``[V_local]`` or ``None``.
        vocab_size: ids from here on are padding and get no probability; default: no padding.
        group: the ranks that hold the other rows, or ``None`` when this is the whole table.

    Returns:
        The sum, a scalar: fp32 (fp64 for fp64 input), the same on every rank. The gradient of ``hidden`` is this
        rank's part of the sum over ranks: the caller all-reduces it. The upstream gradient must be the same on
        every rank.
    """
    size = vocab_start + table.shape[0] if vocab_size is None else vocab_size
    valid = min(max(size - vocab_start, 0), table.shape[0])
    needs = tuple(
        torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, table, bias)
    )
    out: Tensor = _LinearCrossEntropy.apply(hidden, table, bias, targets, vocab_start, valid, group, needs)
    return out


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        table: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        start: int,
        valid: int,
        group: dist.ProcessGroup | None,
        needs: tuple[bool, bool, bool],
    ) -> Tensor:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        rows = table.detach()[:valid]
        shift = None if bias is None else bias.detach()[:valid]
        d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs[0] else None
        d_table = torch.zeros(table.shape, dtype=wide, device=table.device) if needs[1] else None
        d_bias = torch.zeros(table.shape[:1], dtype=wide, device=table.device) if needs[2] else None
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        count = max(64, _CHUNK_BYTES // max(1, table.shape[0] * hidden.element_size()))
        for begin in range(0, hidden.shape[0], count):
            part = slice(begin, begin + count)
            h = hidden[part]
            logits = h @ rows.t() if shift is None else torch.addmm(shift, h, rows.t())
            losses, grad = _softmax_loss(logits, targets[part], start, wide, group, any(needs))
            total += losses.sum(dtype=torch.float64)
            if d_hidden is not None:
                torch.mm(grad, rows, out=d_hidden[part])
            if d_table is not None:
                d_table[:valid] += grad.t() @ h
            if d_bias is not None:
                d_bias[:valid] += grad.sum(0, dtype=wide)
        ctx.save_for_backward(
            d_hidden,
            None if d_table is None else d_table.to(table.dtype),
            None if d_bias is None or bias is None else d_bias.to(bias.dtype),
        )
        return total.to(wide)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*(None if x is None else x * grad for x in ctx.saved_tensors), None, None, None, None, None)


def _softmax_loss(
    logits: Tensor,
    targets: Tensor,
    start: int,
    wide: torch.dtype,
    group: dist.ProcessGroup | None,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Losses ``[n]`` and the gradient of the logits ``[n, V_local]`` (in their type) of one chunk."""
    scores = logits.to(wide)
    local = targets - start
    inside = (local >= 0) & (local < logits.shape[1])
    place = local.clamp(0, max(logits.shape[1] - 1, 0))[:, None]
    if logits.shape[1]:
        top = scores.amax(1)
        picked = torch.where(inside, scores.gather(1, place).squeeze(1), 0.0)
    else:
        top = scores.new_full(targets.shape, float("-inf"))
        picked = scores.new_zeros(targets.shape)
    if group is not None:
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    weights = (scores - top[:, None]).exp_()
    sums = torch.stack((weights.sum(1), picked))
    if group is not None:
        dist.all_reduce(sums, group=group)
    losses = sums[0].log() + top - sums[1]
    if not with_grad:
        return losses, logits
    weights.div_(sums[0][:, None])
    if logits.shape[1]:
        weights.scatter_add_(1, place, -inside.to(wide)[:, None])
    return losses, weights.to(logits.dtype)
