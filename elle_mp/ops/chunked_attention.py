"""Attention as GEMMs over blocks of a few sequences' weights, which stay in the cache.

For each block of queries: scores = q k^T (bf16 GEMM), softmax and dropout over their rows in one pass (fp32
inside, compiled; see csrc/helpers/softmax.cpp), then weights v. Only the log-sum-exp of each
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

_BLOCK_ELEMENTS = 2 << 20
"""Weights computed at a time over all heads: two such blocks in bf16 are 8 MB of a last-level cache."""

_CAUSAL_ROWS = 256
"""A causal sequence is cut into up to four blocks of queries, of at least so many rows: what its upper triangle
saves must be worth the smaller GEMMs."""


def chunked_attention(
    q: Tensor, k: Tensor | None, v: Tensor | None, causal: bool, dropout: float, keys: Tensor, first_head: int
) -> Tensor:
    """Attention of every sequence with itself.

    Args:
        q: ``[B, S, G, J, hd]`` (``J`` query heads to a group), or all of ``[B, S, G, J + 2, hd]`` with key
            and value last.
        k, v: ``[B, S, G, hd]``, or ``None`` when ``q`` has them.
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
class _Block:
    """Some queries of some sequences: what is computed at a time."""

    samples: slice
    first: int
    end: int
    seen: int
    """Number of keys that any of the queries sees."""


@dataclass(frozen=True)
class _Rows:
    """The passes over rows of weights, between the GEMMs."""

    causal: bool
    dropout: float
    keys: Tensor
    first_head: int
    length: int

    def blocks(self, heads: int) -> Iterator[list[_Block]]:
        """The blocks of a group of sequences: short sequences together, a long one in several blocks."""
        batch, per_query = len(self.keys), max(1, heads * self.length)
        rows = max(1, min(self.length, _BLOCK_ELEMENTS // per_query))
        if self.causal:
            rows = min(rows, max(_CAUSAL_ROWS, -(-self.length // 4)))
        count = max(1, _BLOCK_ELEMENTS // (per_query * rows))
        for start in range(0, batch, count):
            samples = slice(start, min(batch, start + count))
            cuts = [(first, min(self.length, first + rows)) for first in range(0, self.length, rows)]
            yield [_Block(samples, first, end, end if self.causal else self.length) for first, end in cuts]

    def forward(self, scores: Tensor, lse: Tensor, block: _Block, scale: float) -> None:
        """Turns scores ``[n, H, Q, K]`` into dropped weights in place and writes ``lse [n, H, Q]``."""
        native = self._native("softmax_forward", scores)
        if native is not None:
            native(as_array(scores), as_array(lse), *self._arguments(block, scale))
            return
        wide = self._scaled(scores, block.first, scale)
        lse.copy_(torch.logsumexp(wide, -1))
        weights = wide.sub_(lse[..., None]).exp_()
        if threshold(self.dropout):
            weights.mul_(self._mask(scores, block)).mul_(keep_scale(self.dropout))
        scores.copy_(weights)

    def backward(self, scores: Tensor, grads: Tensor, lse: Tensor, block: _Block, scale: float) -> None:
        """Turns scores into dropped weights, and ``grads`` of these into gradients of ``q k^T``, in place."""
        native = self._native("softmax_backward", scores)
        if native is not None:
            native(as_array(scores), as_array(grads), as_array(lse), *self._arguments(block, scale))
            return
        weights = self._scaled(scores, block.first, scale).sub_(lse[..., None]).exp_()
        wide = grads.to(weights.dtype)
        if threshold(self.dropout):
            mask = self._mask(scores, block).to(wide.dtype) * keep_scale(self.dropout)
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

    def _arguments(self, block: _Block, scale: float) -> tuple[Any, ...]:
        masks = as_array(self.keys[block.samples]), self.first_head, block.first, self.length, self.causal
        p = self.dropout
        return (*masks, threshold(p), scale, keep_scale(p), torch.get_num_threads())

    def _scaled(self, scores: Tensor, first: int, scale: float) -> Tensor:
        wide = scores.to(torch.float64 if scores.dtype == torch.float64 else torch.float32) * scale
        if self.causal:
            query = torch.arange(first, first + scores.shape[2], device=scores.device)
            later = torch.arange(scores.shape[3], device=scores.device) > query[:, None]
            wide.masked_fill_(later, float("-inf"))
        return wide

    def _mask(self, scores: Tensor, block: _Block) -> Tensor:
        keys = self.keys[block.samples].to(scores.device)
        _, heads, queries, columns = scores.shape
        starts = ((self.first_head + head) * self.length + block.first for head in range(heads))
        return torch.stack([keep_mask(keys, start, queries, columns, self.dropout) for start in starts], dim=1)


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


def _gather(x: Tensor) -> Tensor:
    """``[n, S, G, J, hd]`` as contiguous ``[n * G, J, S, hd]``.

    Copying costs little; the GEMMs of short rows far apart in memory are a quarter slower.
    """
    return x.permute(0, 2, 3, 1, 4).contiguous().flatten(0, 1)


def _scatter(out: Tensor, x: Tensor) -> None:
    """Writes ``x [n * G, J, S, hd]`` to ``out [n, S, G, J, hd]``."""
    out.permute(0, 2, 3, 1, 4).copy_(x.view(out.shape[0], out.shape[2], *x.shape[1:]))


def _some(x: Tensor, block: _Block) -> Tensor:
    """A block's queries of ``x [m, J, S, hd]``, as ``[m, J * Q, hd]``: a group's queries meet its keys at once."""
    return x[:, :, block.first : block.end].flatten(1, 2)


def _forward(q: Tensor, k: Tensor, v: Tensor, rows: _Rows) -> tuple[Tensor, Tensor]:
    batch, length, groups, queries, head_dim = q.shape
    heads, scale = groups * queries, head_dim**-0.5
    out = q.new_empty(q.shape)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = torch.empty(batch, heads, length, dtype=wide, device=q.device)
    buffer = q.new_empty(_largest(rows, heads))
    for blocks in rows.blocks(heads):
        samples = blocks[0].samples
        count = samples.stop - samples.start
        query, key, value = _gather(q[samples]), _gather(k[samples, :, :, None]), _gather(v[samples, :, :, None])
        parts = []
        for block in blocks:
            size = block.end - block.first
            scores = buffer[: count * heads * size * block.seen].view(-1, queries * size, block.seen)
            torch.bmm(_some(query, block), key[:, 0, : block.seen].transpose(1, 2), out=scores)
            flat = scores.view(count, heads, size, block.seen)
            rows.forward(flat, lse[samples, :, block.first : block.end], block, scale)
            parts.append(torch.bmm(scores, value[:, 0, : block.seen]).unflatten(1, (queries, size)))
        _scatter(out[samples], _join(parts))
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
    _, _, groups, queries, head_dim = q.shape
    heads, scale = groups * queries, head_dim**-0.5
    buffers = q.new_empty(2, _largest(rows, heads))
    for blocks in rows.blocks(heads):
        samples = blocks[0].samples
        count = samples.stop - samples.start
        query, d_mixed = _gather(q[samples]), _gather(grad[samples])
        key, value = _gather(k[samples, :, :, None]), _gather(v[samples, :, :, None])
        d_query: list[Tensor] = []
        d_key, d_value = _Sum(key, blocks), _Sum(value, blocks)
        for block in blocks:
            size, seen = block.end - block.first, block.seen
            shape = (-1, queries * size, seen)
            scores, grads = (x[: count * heads * size * seen].view(shape) for x in buffers)
            some, d_some = _some(query, block), _some(d_mixed, block)
            torch.bmm(some, key[:, 0, :seen].transpose(1, 2), out=scores)
            torch.bmm(d_some, value[:, 0, :seen].transpose(1, 2), out=grads)
            flat = (count, heads, size, seen)
            part = lse[samples, :, block.first : block.end]
            rows.backward(scores.view(flat), grads.view(flat), part, block, scale)
            d_query.append(torch.bmm(grads, key[:, 0, :seen]).unflatten(1, (queries, size)))
            d_key.add(torch.bmm(grads.transpose(1, 2), some))
            d_value.add(torch.bmm(scores.transpose(1, 2), d_some))
        _scatter(out[0][samples], _join(d_query))
        for target, total in zip(out[1:], (d_key, d_value), strict=True):
            _scatter(target[samples, :, :, None], total.value[:, None])


def _join(parts: list[Tensor]) -> Tensor:
    """The blocks of queries ``[m, J, Q, hd]`` one after the other."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


class _Sum:
    """The gradient of a group's keys or values, ``value [m, S, hd]``; several blocks add up in fp32."""

    def __init__(self, like: Tensor, blocks: list[_Block]) -> None:
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.single = len(blocks) == 1
        self.value = like[:, 0] if self.single else torch.zeros_like(like[:, 0], dtype=wide)

    def add(self, part: Tensor) -> None:
        """Adds the part of a block, ``[m, seen, hd]``."""
        if self.single:
            self.value = part
        else:
            self.value[:, : part.shape[1]] += part


def _largest(rows: _Rows, heads: int) -> int:
    """Number of weights of the largest block."""
    sizes = (
        (block.samples.stop - block.samples.start) * heads * (block.end - block.first) * block.seen
        for blocks in rows.blocks(heads)
        for block in blocks
    )
    return max(sizes, default=0)
