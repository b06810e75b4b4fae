"""Multi-head attention with grouped keys and values, and layout-independent dropout.

On the CPU, in fp32 and bf16, this is :mod:`elle_mp.ops.expanded_attention`. Elsewhere it is PyTorch's SDPA or, when
attention weights are dropped, that again where the CUDA library was built (bf16 and fp16), and
:mod:`elle_mp.ops.chunked_attention` without it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from elle_mp.ops.chunked_attention import chunked_attention
from elle_mp.ops.dropout import DropoutKey, keep_mask, keep_scale, sample_keys, threshold
from elle_mp.ops.expanded_attention import attention_kernel, has_kernel, packed_attention_kernel


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    dropout: float = 0.0,
    key: DropoutKey | None = None,
    first_head: int = 0,
    heads: int | None = None,
    runs: Sequence[range] | None = None,
) -> Tensor:
    """Scaled dot-product attention, softmax(q k^T / sqrt(hd)) v, of every sequence with itself.

    Args:
        q: ``[B, S, H, hd]``, any strides; ``[B, Sq, H, hd]`` with ``runs``.
        k, v: ``[B, S, G, hd]`` with ``G`` dividing ``H``: query head ``h`` reads group ``h // (H / G)``.
        causal: position ``s`` sees positions up to ``s`` only.
        dropout: probability of dropping an attention weight.
        key: needed when ``dropout`` is positive.
        first_head: number of ``q[:, :, 0]`` among the heads of all tensor-parallel ranks: masks go by it.
        heads: how many heads all ranks have together; only checked.
        runs: which of the ``S`` positions the queries have, in their order, when this rank holds some of them
            (context parallelism). They see, and drop, what they would if all were here.

    Returns:
        ``[B, S, H, hd]``, or ``[B, Sq, H, hd]``.

    Raises:
        ValueError: the shapes do not fit, or a key is missing.
    """
    _check_shapes(q, k, v, runs)
    local, groups = q.shape[2], k.shape[2]
    keys = _keys(q.shape[0], dropout, key)
    _check_heads(first_head, local, heads)
    if _takes_kernel(q, dropout):
        return attention_kernel(q, k, v, causal, dropout, keys, first_head, runs)
    if threshold(dropout) == 0:
        return _sdpa(q, k, v, causal) if runs is None else _sdpa_of_runs(q, k, v, causal, runs)
    grouped = q.unflatten(2, (groups, local // groups))
    return chunked_attention(grouped, k, v, causal, dropout, keys, first_head, runs).flatten(2, 3)


def packed_attention(
    qkv: Tensor,
    *,
    causal: bool,
    dropout: float = 0.0,
    key: DropoutKey | None = None,
    first_head: int = 0,
    heads: int | None = None,
) -> Tensor:
    """:func:`attention` of a fused projection; its gradient is written in place of that of three slices.

    Args:
        qkv: ``[B, S, G, H / G + 2, hd]``: of each group the queries, then its key, then its value.

    Returns:
        ``[B, S, H, hd]``.

    Raises:
        ValueError: as :func:`attention`.
    """
    batch, length, groups, slots, head_dim = qkv.shape
    local = groups * (slots - 2)
    keys = _keys(batch, dropout, key)
    _check_heads(first_head, local, heads)
    if _takes_kernel(qkv, dropout):
        return packed_attention_kernel(qkv, causal, dropout, keys, first_head)
    if threshold(dropout) == 0:
        q, k, v = qkv[:, :, :, :-2], qkv[:, :, :, -2], qkv[:, :, :, -1]
        return _sdpa(q.reshape(batch, length, local, head_dim), k, v, causal)
    return chunked_attention(qkv, None, None, causal, dropout, keys, first_head).flatten(2, 3)


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, dropout: float, keys: Tensor | None, first_head: int
) -> Tensor:
    """:func:`attention` of all positions spelled out: every weight is materialised. What the tests compare with."""
    batch, length, heads, head_dim = q.shape
    grouped = q.reshape(batch, length, k.shape[2], heads // k.shape[2], head_dim)
    scores = torch.einsum("bsgjd,btgd->bgjst", grouped, k) * head_dim**-0.5
    if causal:
        above = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(above, float("-inf"))
    wide = scores.dtype if scores.dtype == torch.float64 else torch.float32
    weights = torch.softmax(scores, dim=-1, dtype=wide)
    if keys is not None and threshold(dropout):
        keep = keep_mask(keys.to(q.device), first_head * length, heads * length, length, dropout)
        weights = weights * keep.view(weights.shape).to(wide) * keep_scale(dropout)
    return torch.einsum("bgjst,btgd->bsgjd", weights.to(v.dtype), v).reshape(batch, length, heads, head_dim)


def _takes_kernel(x: Tensor, dropout: float) -> bool:
    """Whether our kernel is taken: on GPUs only for what SDPA cannot do, masks that do not depend on the layout."""
    return has_kernel(x) and (x.device.type == "cpu" or threshold(dropout) > 0)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    grouped = q.shape[2] != k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped).transpose(1, 2)


def _sdpa_of_runs(q: Tensor, k: Tensor, v: Tensor, causal: bool, runs: Sequence[range]) -> Tensor:
    """SDPA of queries that are some of the sequence, each run with the keys up to its end."""
    if not causal:
        return _sdpa(q, k, v, causal)
    parts = q.split([len(run) for run in runs], dim=1)
    return torch.cat(
        [_sdpa_of_last(x, k[:, : run.stop], v[:, : run.stop]) for x, run in zip(parts, runs, strict=True)], 1
    )


def _sdpa_of_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal SDPA of the last positions' queries; ``is_causal`` would take them for the first ones."""
    queries, seen = q.shape[1], k.shape[1]
    if queries == seen:
        return _sdpa(q, k, v, causal=True)
    grouped = q.shape[2] != k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    mask: Tensor
    if q.is_cuda:
        mask = causal_lower_right(queries, seen)  # no tensor of weights: FlashAttention aligns so by itself
    else:
        mask = torch.ones(queries, seen, dtype=torch.bool, device=q.device).tril(seen - queries)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped).transpose(1, 2)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, runs: Sequence[range] | None) -> None:
    batch, queries, local, head_dim = q.shape
    length, groups = k.shape[1:3]
    fit = k.shape == v.shape == (batch, length, groups, head_dim) and groups > 0 and local % groups == 0
    if runs is None:
        fit = fit and queries == length
    else:
        fit = fit and sum(map(len, runs)) == queries and all(0 <= run.start <= run.stop <= length for run in runs)
    if not fit:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"attention shapes do not fit: {shapes}" + (f", runs {list(runs)}" if runs else ""))


def _keys(batch: int, dropout: float, key: DropoutKey | None) -> Tensor:
    """int64 ``[B]``; zeros when nothing is dropped."""
    if threshold(dropout) == 0:
        return torch.zeros(batch, dtype=torch.int64)
    if key is None or key.samples.shape != (batch,):
        raise ValueError(f"attention with dropout {dropout} wants a key for {batch} sequences")
    return sample_keys(key)


def _check_heads(first_head: int, local: int, heads: int | None) -> None:
    if heads is not None and first_head + local > heads:
        raise ValueError(f"heads {first_head} to {first_head + local} are not among {heads}")
