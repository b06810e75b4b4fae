"""Multi-head attention with grouped keys and values, and layout-independent dropout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from elle_mp.ops.dropout import DropoutKey, keep_mask, keep_scale, sample_keys, threshold


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
) -> Tensor:
    """Scaled dot-product attention, softmax(q k^T / sqrt(hd)) v, of every sequence with itself.

    Args:
        q: ``[B, S, H, hd]``, any strides.
        k, v: ``[B, S, G, hd]`` with ``G`` dividing ``H``: query head ``h`` reads group ``h // (H / G)``.
        causal: position ``s`` sees positions up to ``s`` only.
        dropout: probability of dropping an attention weight.
        key: needed when ``dropout`` is positive.
        first_head: number of ``q[:, :, 0]`` among the heads of all tensor-parallel ranks: masks go by it.
        heads: how many heads all ranks have together; only checked.

    Returns:
        ``[B, S, H, hd]``.

    Raises:
        ValueError: the shapes do not fit, or a key is missing.
    """
    _check(q, k, v, dropout, key, first_head, heads)
    if threshold(dropout) == 0:
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=causal,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return out.transpose(1, 2)
    assert key is not None
    return attention_reference(q, k, v, causal, dropout, sample_keys(key), first_head)


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, dropout: float, keys: Tensor | None, first_head: int
) -> Tensor:
    """The same, spelled out: every weight is materialised. For tests, and where nothing faster exists."""
    batch, length, heads, head_dim = q.shape
    groups = k.shape[2]
    grouped = q.reshape(batch, length, groups, heads // groups if groups else 0, head_dim)
    scores = torch.einsum("bsgjd,btgd->bgjst", grouped, k) * head_dim**-0.5
    if causal:
        above = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(above, float("-inf"))
    wide = scores.dtype if scores.dtype == torch.float64 else torch.float32
    weights = torch.softmax(scores, dim=-1, dtype=wide)
    if keys is not None and threshold(dropout):
        keep = keep_mask(keys.to(q.device), first_head * length, heads * length, length, dropout)
        weights = weights * keep.view(weights.shape) * keep_scale(dropout)
    return torch.einsum("bgjst,btgd->bsgjd", weights.to(v.dtype), v).reshape(batch, length, heads, head_dim)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float,
    key: DropoutKey | None,
    first_head: int,
    heads: int | None,
) -> None:
    batch, length, local, head_dim = q.shape
    if (
        k.shape != v.shape
        or k.shape[:2] != (batch, length)
        or k.shape[3] != head_dim
        or local % max(k.shape[2], 1)
    ):
        raise ValueError(
            f"attention shapes do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if threshold(dropout) and (key is None or key.samples.shape != (batch,)):
        raise ValueError(f"attention with dropout {dropout} wants a key for {batch} sequences")
    if heads is not None and first_head + local > heads:
        raise ValueError(f"heads {first_head} to {first_head + local} are not among {heads}")
