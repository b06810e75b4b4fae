"""Attention in plain PyTorch, as GEMMs over blocks of a few sequences' weights, with our dropout masks.

For each block of queries: scores = q k^T, softmax and dropout over their rows (fp32 inside), then weights v. Only
the log-sum-exp of each row is kept; the backward pass recomputes the scores and the masks (as FlashAttention does,
arXiv 2205.14135). Of a causal block the columns after its last query are never computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from elle_mp.ops.dropout import keep_mask, keep_scale, threshold

_BLOCK_ELEMENTS = 2 << 20
"""Weights computed at a time over all heads: two such blocks in bf16 are 8 MB."""

_CAUSAL_ROWS = 512
"""A causal sequence is cut into up to four blocks of queries, of at least so many rows: what its upper triangle
saves must be worth the smaller GEMMs."""


def chunked_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    causal: bool,
    dropout: float,
    keys: Tensor,
    first_head: int,
    runs: Sequence[range] | None = None,
) -> Tensor:
    """Attention of every sequence with itself, for all of its queries or some.

    Args:
        q: ``[B, Sq, G, J, hd]`` (``J`` query heads to a group), or all of ``[B, S, G, J + 2, hd]`` with key
            and value last.
        k, v: ``[B, S, G, hd]``, or ``None`` when ``q`` has them.
        keys: int64 ``[B]``, :func:`elle_mp.ops.dropout.sample_keys`.
        first_head: number of the first query head in the masks.
        runs: the positions of the ``Sq`` queries among the ``S`` keys; ``None`` when they are the same.

    Returns:
        ``[B, Sq, G, J, hd]``, contiguous.
    """
    length = q.shape[1] if k is None else k.shape[1]
    rows = _Rows(causal, dropout, keys, first_head, length, tuple(runs or (range(length),)))
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
    place: int
    """Position of the first query in the sequence."""
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
    """Number of keys."""
    runs: tuple[range, ...]
    """Positions of the queries, in the order in which they lie."""

    def blocks(self, heads: int) -> Iterator[list[_Block]]:
        """The blocks of a group of sequences: short sequences together, a long one in several blocks."""
        batch, per_query = len(self.keys), max(1, heads * self.length)
        rows = max(1, min(max(map(len, self.runs)), _BLOCK_ELEMENTS // per_query))
        if self.causal:
            rows = min(rows, max(_CAUSAL_ROWS, -(-self.length // 4)))
        count = max(1, _BLOCK_ELEMENTS // (per_query * rows))
        for start in range(0, batch, count):
            samples = slice(start, min(batch, start + count))
            yield list(self._cuts(samples, rows))

    def _cuts(self, samples: slice, rows: int) -> Iterator[_Block]:
        """Blocks of up to ``rows`` queries; none reaches over a run's end."""
        first = 0
        for run in self.runs:
            for place in range(run.start, run.stop, rows):
                size = min(rows, run.stop - place)
                yield _Block(samples, first, first + size, place, place + size if self.causal else self.length)
                first += size

    def forward(self, scores: Tensor, lse: Tensor, block: _Block, scale: float) -> None:
        """Turns scores ``[n, H, Q, K]`` into dropped weights in place and writes ``lse [n, H, Q]``."""
        wide = self._scaled(scores, block.place, scale)
        lse.copy_(torch.logsumexp(wide, -1))
        weights = wide.sub_(lse[..., None]).exp_()
        if threshold(self.dropout):
            weights.mul_(self._mask(scores, block)).mul_(keep_scale(self.dropout))
        scores.copy_(weights)

    def backward(self, scores: Tensor, grads: Tensor, lse: Tensor, block: _Block, scale: float) -> None:
        """Turns scores into dropped weights, and ``grads`` of these into gradients of ``q k^T``, in place."""
        weights = self._scaled(scores, block.place, scale).sub_(lse[..., None]).exp_()
        wide = grads.to(weights.dtype)
        if threshold(self.dropout):
            mask = self._mask(scores, block).to(wide.dtype) * keep_scale(self.dropout)
            wide = wide * mask
            scores.copy_(weights * mask)
        else:
            scores.copy_(weights)
        product = weights * wide
        grads.copy_(product.sub_(weights.mul_(product.sum(-1, keepdim=True))).mul_(scale))

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
        starts = ((self.first_head + head) * self.length + block.place for head in range(heads))
        return torch.stack([keep_mask(keys, start, queries, columns, self.dropout) for start in starts], dim=1)


class _Separate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rows: _Rows) -> Tensor:
        gathered = _gather(q), _gather(k[:, :, :, None]), _gather(v[:, :, :, None])
        mixed, lse = _forward(*gathered, rows)
        ctx.save_for_backward(*gathered, lse)
        ctx.rows = rows
        return _scattered(mixed, q.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, lse = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        _backward(q, k, v, lse, _gather(grad), (dq, dk, dv), ctx.rows)
        batch, _, groups, _, head_dim = grad.shape
        shape = (batch, k.shape[2], groups, 1, head_dim)
        d_key, d_value = (_scattered(x, shape)[:, :, :, 0] for x in (dk, dv))
        return _scattered(dq, grad.shape), d_key, d_value, None


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, rows: _Rows) -> Tensor:
        batch, length, groups, slots, head_dim = qkv.shape
        gathered = qkv.permute(3, 0, 2, 1, 4).contiguous()
        mixed, lse = _forward(*_slots(gathered), rows)
        ctx.save_for_backward(gathered, lse)
        ctx.rows = rows
        return _scattered(mixed, (batch, length, groups, slots - 2, head_dim))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        gathered, lse = ctx.saved_tensors
        out = torch.empty_like(gathered)
        q, k, v = _slots(gathered)
        dq, dk, dv = _slots(out)
        _backward(q, k, v, lse, _gather(grad), (dq, dk, dv), ctx.rows)
        queries = q.shape[1]
        if queries > 1:
            # dq was no view: one query head to a group is the case that matters.
            out[:-2] = dq.unflatten(0, out.shape[1:3]).permute(2, 0, 1, 3, 4)
        return out.permute(1, 3, 2, 0, 4).contiguous(), None


def _slots(gathered: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``[B * G, J, S, hd]``, keys and values ``[B * G, 1, S, hd]`` of ``[J + 2, B, G, S, hd]``."""
    flat = gathered.flatten(1, 2)
    return flat[:-2].transpose(0, 1).contiguous(), flat[-2][:, None], flat[-1][:, None]


def _gather(x: Tensor) -> Tensor:
    """``[B, S, G, J, hd]`` as contiguous ``[B * G, J, S, hd]``.

    One copy costs little; the GEMMs of short rows far apart in memory are a quarter slower.
    """
    return x.permute(0, 2, 3, 1, 4).contiguous().flatten(0, 1)


def _scattered(x: Tensor, shape: Sequence[int]) -> Tensor:
    """``x [B * G, J, S, hd]`` as contiguous ``[B, S, G, J, hd]``, which is ``shape``."""
    return x.view(shape[0], shape[2], *x.shape[1:]).permute(0, 3, 1, 2, 4).contiguous()


def _some(x: Tensor, block: _Block) -> Tensor:
    """A block's queries of ``x [m, J, S, hd]``, as ``[m, J * Q, hd]``: a group's queries meet its keys at once."""
    return x[:, :, block.first : block.end].flatten(1, 2)


def _put(x: Tensor, block: _Block, left: Tensor, right: Tensor) -> None:
    """Writes ``left @ right [m, J * Q, hd]`` to the block's queries of ``x [m, J, S, hd]``."""
    if block.end - block.first == x.shape[2]:
        torch.bmm(left, right, out=x.flatten(1, 2))
    else:
        part = x[:, :, block.first : block.end]
        part.copy_(torch.bmm(left, right).view(part.shape))


def _forward(q: Tensor, k: Tensor, v: Tensor, rows: _Rows) -> tuple[Tensor, Tensor]:
    """Mixed values ``[B * G, J, S, hd]`` and the log-sum-exp ``[B, H, S]`` of gathered queries, keys, values."""
    queries, length, head_dim = q.shape[1:]
    batch = len(rows.keys)
    groups = q.shape[0] // max(batch, 1)
    heads, scale = groups * queries, head_dim**-0.5
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    mixed, lse = torch.empty_like(q), torch.empty(batch, heads, length, dtype=wide, device=q.device)
    buffer = q.new_empty(_largest(rows, heads))
    for blocks in rows.blocks(heads):
        samples = blocks[0].samples
        part = slice(samples.start * groups, samples.stop * groups)
        for block in blocks:
            size, seen = block.end - block.first, block.seen
            flat = (samples.stop - samples.start, heads, size, seen)
            scores = buffer[: prod(flat)].view(-1, queries * size, seen)
            torch.bmm(_some(q[part], block), k[part, 0, :seen].transpose(1, 2), out=scores)
            rows.forward(scores.view(flat), lse[samples, :, block.first : block.end], block, scale)
            _put(mixed[part], block, scores, v[part, 0, :seen])
    return mixed, lse


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    grad: Tensor,
    out: tuple[Tensor, Tensor, Tensor],
    rows: _Rows,
) -> None:
    """Writes the gradients of gathered queries, keys and values to ``out``, which is laid out as they are."""
    queries, _, head_dim = q.shape[1:]
    heads, scale = lse.shape[1], head_dim**-0.5
    groups = heads // queries
    buffers = q.new_empty(2, _largest(rows, heads))
    for blocks in rows.blocks(heads):
        samples = blocks[0].samples
        part = slice(samples.start * groups, samples.stop * groups)
        d_key, d_value = (_Sum(x[part, 0], blocks) for x in out[1:])
        for block in blocks:
            size, seen = block.end - block.first, block.seen
            flat = (samples.stop - samples.start, heads, size, seen)
            scores, grads = (x[: prod(flat)].view(-1, queries * size, seen) for x in buffers)
            some, d_some = _some(q[part], block), _some(grad[part], block)
            torch.bmm(some, k[part, 0, :seen].transpose(1, 2), out=scores)
            torch.bmm(d_some, v[part, 0, :seen].transpose(1, 2), out=grads)
            statistics = lse[samples, :, block.first : block.end]
            rows.backward(scores.view(flat), grads.view(flat), statistics, block, scale)
            _put(out[0][part], block, grads, k[part, 0, :seen])
            d_key.add(grads.transpose(1, 2), some)
            d_value.add(scores.transpose(1, 2), d_some)
        d_key.finish()
        d_value.finish()


class _Sum:
    """A sum of products over blocks, into ``out [m, S, hd]``; added up in fp32 if not one product of all keys."""

    def __init__(self, out: Tensor, blocks: list[_Block]) -> None:
        self.out = out
        wide = torch.float64 if out.dtype == torch.float64 else torch.float32
        whole = len(blocks) == 1 and blocks[0].seen == out.shape[1]
        self.total = None if whole else torch.zeros_like(out, dtype=wide)

    def add(self, left: Tensor, right: Tensor) -> None:
        """Adds ``left @ right [m, seen, hd]``."""
        if self.total is None:
            torch.bmm(left, right, out=self.out)
        else:
            self.total[:, : left.shape[1]] += torch.bmm(left, right)

    def finish(self) -> None:
        """Writes what was added up."""
        if self.total is not None:
            self.out.copy_(self.total)


def _largest(rows: _Rows, heads: int) -> int:
    """Number of weights of the largest block."""
    sizes = (
        (block.samples.stop - block.samples.start) * heads * (block.end - block.first) * block.seen
        for blocks in rows.blocks(heads)
        for block in blocks
    )
    return max(sizes, default=0)
