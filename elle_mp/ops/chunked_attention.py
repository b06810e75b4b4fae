"""Attention as GEMMs over blocks of one sequence's weights, which stay in the cache.

For each sequence and block of queries: scores = q k^T (bf16 GEMM), softmax and dropout over their rows in
one pass (fp32 inside, compiled; see csrc/helpers/softmax.cpp), then weights v. Only the log-sum-exp of each
row is kept; the backward pass recomputes the scores and the masks (as FlashAttention does, arXiv
2205.14135). Of a causal block the columns after its last query are never computed. PyTorch's CPU SDPA takes
three times as long in bf16, and leaves its fast path altogether when weights are dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elle_mp.ops.dropout import keep_mask, keep_scale, threshold
from elle_mp.ops.native import as_array, helpers

_BLOCK_ELEMENTS = 4 << 20
"""Weights of one block of queries over all heads: two such blocks in bf16 fit a usual last-level cache."""

_CAUSAL_BLOCKS = 2
"""Into how many blocks of queries a causal sequence is cut at least, if they keep 64 rows."""


def chunked_attention(
    q: Tensor, k: Tensor | None, v: Tensor | None, causal: bool, dropout: float, keys: Tensor, first_head: int
) -> Tensor:
    """Attention of every sequence with itself.

    Args:
        q: ``[B, S, G, J, hd]`` (``J`` query heads to a group), or all of ``[B, S, G, J + 2, hd]`` with key
        and value last. k, v: ``[B, S, G, hd]``, or ``None`` when ``q`` has them.
        keys: int64 ``[B]``, :func:`elle_mp.ops.dropout.sample_keys`.
        first_head: number of the first query head in the masks.

    Returns:
        ``[B, S, G, J, hd]``, contiguous.
    """
    rows = _Rows(causal, dropout, keys, first_head, q.shape[1])
    out: Tensor
    if k is None or v is None:
        out = _Packed.apply(q, rows)
    else:
        out = _Separate.apply(q, k, v, rows)
    return out


@dataclass(frozen=True)
class _Rows:
    """The passes over rows of weights, between the GEMMs."""

    causal: bool
    dropout: float
    keys: Tensor
    first_head: int
    length: int

    def blocks(self, heads: int) -> Iterator[tuple[int, int, int]]:
        """(first query, end query, number of keys) of each block."""
        rows = max(1, _BLOCK_ELEMENTS // max(1, heads * self.length))
        if self.causal:
            rows = min(rows, max(64, -(-self.length // _CAUSAL_BLOCKS)))
        for begin in range(0, self.length, rows):
            end = min(self.length, begin + rows)
            yield begin, end, end if self.causal else self.length

    def several(self, heads: int) -> bool:
        """Whether there is more than one block."""
        return len(list(self.blocks(heads))) > 1

    def largest(self, heads: int) -> int:
        """Number of weights of the largest block."""
        return max((heads * (end - first) * seen for first, end, seen in self.blocks(heads)), default=0)

    def forward(self, scores: Tensor, lse: Tensor, sample: int, first: int, scale: float) -> None:
        """Turns scores ``[H, Q, K]`` into dropped weights in place and writes ``lse [H, Q]``."""
        native = self._native("softmax_forward", scores)
        if native is not None:
            native(as_array(scores)[None], as_array(lse)[None], *self._arguments(sample, first, scale))
            return
        wide = self._scaled(scores, first, scale)
        lse.copy_(torch.logsumexp(wide, -1))
        weights = wide.sub_(lse[..., None]).exp_()
        if threshold(self.dropout):
            weights.mul_(self._mask(scores, sample, first)).mul_(keep_scale(self.dropout))
        scores.copy_(weights)

    def backward(self, scores: Tensor, grads: Tensor, lse: Tensor, sample: int, first: int, scale: float) -> None:
        """Turns scores into dropped weights, and ``grads`` of these into gradients of ``q k^T``, in place."""
        native = self._native("softmax_backward", scores)
        if native is not None:
            arguments = self._arguments(sample, first, scale)
            native(as_array(scores)[None], as_array(grads)[None], as_array(lse)[None], *arguments)
            return
        weights = self._scaled(scores, first, scale).sub_(lse[..., None]).exp_()
        wide = grads.to(weights.dtype)
        if threshold(self.dropout):
            mask = self._mask(scores, sample, first).to(wide.dtype) * keep_scale(self.dropout)
            wide = wide * mask
            scores.copy_(weights * mask)
        else:
            scores.copy_(weights)
        product = weights * wide
        grads.copy_(product.sub_(weights.mul_(product.sum(-1, keepdim=True))).mul_(scale))

    def _native(self, name: str, scores: Tensor) -> Any:
        if scores.device.type != "cpu" or scores.dtype not in (torch.bfloat16, torch.float32):
            return None
        module = helpers(name)
        return None if module is None else getattr(module, name)

    def _arguments(self, sample: int, first: int, scale: float) -> tuple[Any, ...]:
        keys = as_array(self.keys[sample : sample + 1])
        p, threads = self.dropout, torch.get_num_threads()
        return (
            keys, self.first_head, first, self.length, self.causal, threshold(p), scale, keep_scale(p),
            threads
        )  # fmt: skip

    def _scaled(self, scores: Tensor, first: int, scale: float) -> Tensor:
        wide = scores.to(torch.float64 if scores.dtype == torch.float64 else torch.float32) * scale
        if self.causal:
            query = torch.arange(first, first + scores.shape[1], device=scores.device)
            later = torch.arange(scores.shape[2], device=scores.device) > query[:, None]
            wide.masked_fill_(later, float("-inf"))
        return wide

    def _mask(self, scores: Tensor, sample: int, first: int) -> Tensor:
        key = self.keys[sample : sample + 1].to(scores.device)
        heads, queries, columns = scores.shape
        starts = ((self.first_head + head) * self.length + first for head in range(heads))
        return torch.cat([keep_mask(key, start, queries, columns, self.dropout) for start in starts])


class _Separate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rows: _Rows) -> Tensor:
        out, lse = _forward(q, k, v, rows)
        ctx.save_for_backward(q, k, v, lse)
        ctx.rows = rows
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, lse = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        _backward(q, k, v, lse, grad, (dq, dk, dv), ctx.rows)
        return dq, dk, dv, None


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, rows: _Rows) -> Tensor:
        out, lse = _forward(*_slots(qkv), rows)
        ctx.save_for_backward(qkv, lse)
        ctx.rows = rows
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        qkv, lse = ctx.saved_tensors
        d_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
        _backward(*_slots(qkv), lse, grad, _slots(d_qkv), ctx.rows)
        return d_qkv, None


def _slots(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return qkv[:, :, :, :-2], qkv[:, :, :, -2], qkv[:, :, :, -1]


def _by_group(x: Tensor) -> Tensor:
    """``[S, G, J, hd]`` as contiguous ``[G, J * S, hd]``: a group's queries meet its keys at once.

    Copying costs little; the GEMMs of short rows far apart in memory are a quarter slower.
    """
    return x.permute(1, 2, 0, 3).contiguous().flatten(1, 2)


def _product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Writes ``left @ right [G, J * S, hd]`` to ``out [S, G, J, hd]``."""
    length, groups, queries, head_dim = out.shape
    if queries == 1:
        torch.bmm(left, right, out=out[:, :, 0].transpose(0, 1))
    else:
        product = torch.bmm(left, right).view(groups, queries, length, head_dim)
        out.permute(1, 2, 0, 3).copy_(product)


def _forward(q: Tensor, k: Tensor, v: Tensor, rows: _Rows) -> tuple[Tensor, Tensor]:
    batch, length, groups, queries, head_dim = q.shape
    heads, scale = groups * queries, head_dim**-0.5
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_empty(q.shape)
    lse = torch.empty(batch, heads, length, dtype=wide, device=q.device)
    buffer = q.new_empty(rows.largest(heads))
    for sample in range(batch):
        keys, values = (x[sample].transpose(0, 1).contiguous() for x in (k, v))
        for first, end, seen in rows.blocks(heads):
            scores = buffer[: heads * (end - first) * seen].view(groups, queries * (end - first), seen)
            torch.bmm(_by_group(q[sample, first:end]), keys[:, :seen].transpose(1, 2), out=scores)
            flat = scores.view(heads, end - first, seen)
            rows.forward(flat, lse[sample, :, first:end], sample, first, scale)
            _product(scores, values[:, :seen], out[sample, first:end])
    return out, lse


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    grad: Tensor,
    out: tuple[Tensor, Tensor, Tensor],
    rows: _Rows,
) -> None:
    batch, length, groups, queries, head_dim = q.shape
    heads, scale = groups * queries, head_dim**-0.5
    dq, dk, dv = out
    buffers = q.new_empty(2, rows.largest(heads))
    for sample in range(batch):
        keys, values = (x[sample].transpose(0, 1).contiguous() for x in (k, v))
        # Several blocks add their parts in fp32.
        sums = lse.new_zeros(2, groups, length, head_dim) if rows.several(heads) else None
        for first, end, seen in rows.blocks(heads):
            shape = (groups, queries * (end - first), seen)
            scores, grads = (x[: heads * (end - first) * seen].view(shape) for x in buffers)
            block, d_block = _by_group(q[sample, first:end]), _by_group(grad[sample, first:end])
            torch.bmm(block, keys[:, :seen].transpose(1, 2), out=scores)
            torch.bmm(d_block, values[:, :seen].transpose(1, 2), out=grads)
            flat = (heads, end - first, seen)
            rows.backward(scores.view(flat), grads.view(flat), lse[sample, :, first:end], sample, first, scale)
            _product(grads, keys[:, :seen], dq[sample, first:end])
            if sums is None:
                torch.bmm(grads.transpose(1, 2), block, out=dk[sample].transpose(0, 1))
                torch.bmm(scores.transpose(1, 2), d_block, out=dv[sample].transpose(0, 1))
            else:
                sums[0, :, :seen] += torch.bmm(grads.transpose(1, 2), block)
                sums[1, :, :seen] += torch.bmm(scores.transpose(1, 2), d_block)
        if sums is not None:
            dk[sample].transpose(0, 1).copy_(sums[0])
            dv[sample].transpose(0, 1).copy_(sums[1])
