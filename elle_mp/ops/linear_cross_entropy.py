"""The last projection and the cross entropy in one op, so that the logits ``[N, V]`` never exist at once.

The gradient is formed in the forward pass, chunk by chunk, while the chunk's logits are still in the cache
(as in Liger Kernel, arXiv 2410.10989, and Cut Cross-Entropy, arXiv 2411.09009).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from elle_mp.ops.native import as_array, helpers

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
        The sum, a scalar: fp32 (fp64 for fp64 input), the same on every rank. The gradient of ``hidden`` is
        this rank's part of the sum over ranks: the caller all-reduces it. The upstream gradient must be the
        same on every rank.
    """
    size = vocab_start + table.shape[0] if vocab_size is None else vocab_size
    valid = min(max(size - vocab_start, 0), table.shape[0])
    needs = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, table, bias))
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
    """Losses ``[n]`` and the gradient of the logits ``[n, V_local]`` (in their place) of one chunk."""
    local = targets - start
    inside = (local >= 0) & (local < logits.shape[1])
    place = local.clamp(0, max(logits.shape[1] - 1, 0))
    top, total = _stats(logits, wide)
    if logits.shape[1]:
        picked = torch.where(inside, logits.gather(1, place[:, None]).squeeze(1).to(wide), 0.0)
    else:
        picked = top.new_zeros(targets.shape)
    if group is not None:
        mine = top.clone()
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
        sums = torch.stack((total * (mine - top).exp(), picked))
        dist.all_reduce(sums, group=group)
        total, picked = sums
    lse = total.log() + top
    if with_grad:
        _to_gradient(logits, lse, torch.where(inside, local, -1))
    return lse - picked, logits


def _stats(logits: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Maximum and sum of exp(x - maximum) of each row."""
    if logits.shape[1] == 0:
        shape = logits.shape[:1]
        return torch.full(shape, float("-inf"), dtype=wide, device=logits.device), logits.new_zeros(shape, dtype=wide)
    native = helpers("logit_stats")
    if native is not None and _is_native(logits):
        top, total = torch.empty(2, logits.shape[0], dtype=wide)
        native.logit_stats(as_array(logits), as_array(top), as_array(total), torch.get_num_threads())
        return top, total
    top = logits.amax(1).to(wide)
    return top, (logits.to(wide) - top[:, None]).exp_().sum(1)


def _to_gradient(logits: Tensor, lse: Tensor, local: Tensor) -> None:
    """Turns logits into ``softmax - onehot(local)`` in place; ``local`` is -1 for targets of other ranks."""
    native = helpers("logit_gradient")
    if native is not None and _is_native(logits):
        native.logit_gradient(as_array(logits), as_array(lse), as_array(local), torch.get_num_threads())
        return
    weights = (logits.to(lse.dtype) - lse[:, None]).exp_()
    if logits.shape[1]:
        weights.scatter_add_(1, local.clamp(min=0)[:, None], -(local >= 0).to(lse.dtype)[:, None])
    logits.copy_(weights)


def _is_native(logits: Tensor) -> bool:
    return logits.device.type == "cpu" and logits.dtype == torch.bfloat16 and logits.is_contiguous()
