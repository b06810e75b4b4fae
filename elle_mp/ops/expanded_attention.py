"""Attention of an expanded model: uneven groups of heads, a prompt in front, packed documents, padding, dropout.

``csrc/ops`` has the kernels for the CPU, for fp32 and bf16, and ``csrc/cuda`` those for GPUs, for bf16 and fp16 and
heads of up to 128 elements: a running softmax over blocks of keys (FlashAttention, arXiv 2205.14135), so nothing of
size S x S is in memory, and blocks of which no query sees a key are skipped. The backward pass computes scores and
masks again; its sums have a fixed order, so results are bitwise repeatable and the same for every number of threads.
Everything else runs on :func:`expanded_attention_reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from elle_mp.ops.dropout import DropoutKey, keep_mask, keep_scale, sample_keys, threshold
from elle_mp.ops.library import compiled_ops, cuda_ops

KERNEL_TYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16, torch.float16)}
"""Types that the kernels of each kind of device take."""

CUDA_HEAD_DIM = 128
"""Most elements of a head that the CUDA kernels take."""


def expanded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    kv_map: Sequence[int] | None = None,
    prompt_length: int | Tensor = 0,
    doc_starts: Tensor | None = None,
    key_lengths: Tensor | None = None,
    positions: Tensor | None = None,
    dropout: float = 0.0,
    key: DropoutKey | None = None,
    first_head: int = 0,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention ``softmax(scale q k^T) v`` over the keys that each query sees.

    The ``T`` positions of a sequence are its prompt, ``P`` of them, and its text. A query at position ``i`` sees the
    keys ``j`` that are before ``key_lengths``, not after ``i`` if ``causal``, and in its own document or the prompt.

    Args:
        q: ``[B, Sq, H, D]``, any strides.
        k, v: ``[B, T, G, D]``, ``T`` at least ``Sq``.
        causal: a position sees none after it.
        kv_map: the head of ``k`` and ``v`` that each query head reads; ``h // (H / G)`` when not given.
        prompt_length: ``P``, or int64 ``[B]``; only of interest together with ``doc_starts``.
        doc_starts: int64 ``[B, T]``, in ascending order along ``T``: the position at which each position's document
            starts; 0 in the prompt, which is a document of its own. ``None``: one document, prompt included.
        key_lengths: int64 ``[B]``: keys from here on are padding.
        positions: int64 ``[Sq]``, the queries' positions; the last ``Sq`` when not given.
        dropout: probability of dropping a weight.
        key: needed when ``dropout`` is positive; ``(head, position)`` numbers the rows of the mask.
        first_head: number of ``q[:, :, 0]`` among the heads of all tensor-parallel ranks: masks go by it.
        scale: positive; ``D ** -0.5`` when not given.

    Returns:
        ``[B, Sq, H, D]`` in the type of ``q``, and the log-sum-exp of each query's scaled scores, ``[B, H, Sq]`` in
        fp32 (fp64 for fp64). A query that sees nothing has 0 and ``-inf``.

    Raises:
        ValueError: the arguments do not fit.
    """
    shape = _Shape(q, k, v, kv_map, positions)
    shape.check_masks(doc_starts, key_lengths)
    keys = _keys(shape.batch, dropout, key)
    scale = shape.dim**-0.5 if scale is None else scale
    if scale <= 0.0:
        raise ValueError(f"expanded_attention: scale {scale} is not positive")
    if has_kernel(q):
        seen = seen_keys(shape, causal, prompt_length, doc_starts, key_lengths)
        kv = torch.tensor(shape.kv_map, dtype=torch.int64)
        numbers = first_head, threshold(dropout), scale
        keys, positions = keys.to(q.device), shape.positions.to(q.device)
        out, lse = _KERNELS.expanded_attention(q, k, v, kv, seen.to(q.device), keys, positions, *numbers)
        return out, lse
    mask = seen_mask(shape, causal, prompt_length, doc_starts, key_lengths)
    return _reference(q, k, v, shape, mask, dropout, keys, first_head, scale)


def expanded_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    kv_map: Sequence[int] | None = None,
    prompt_length: int | Tensor = 0,
    doc_starts: Tensor | None = None,
    key_lengths: Tensor | None = None,
    positions: Tensor | None = None,
    dropout: float = 0.0,
    key: DropoutKey | None = None,
    first_head: int = 0,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`expanded_attention` spelled out: every weight is in memory. It defines the op."""
    shape = _Shape(q, k, v, kv_map, positions)
    shape.check_masks(doc_starts, key_lengths)
    keys = _keys(shape.batch, dropout, key)
    mask = seen_mask(shape, causal, prompt_length, doc_starts, key_lengths)
    return _reference(q, k, v, shape, mask, dropout, keys, first_head, shape.dim**-0.5 if scale is None else scale)


def attention_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    dropout: float,
    keys: Tensor,
    first_head: int,
    runs: Sequence[range] | None = None,
) -> Tensor:
    """Attention of sequences without prompt, documents or padding: ``[B, Sq, H, D]``.

    Only where :func:`has_kernel` says so, with ``G`` dividing ``H``.

    Args:
        keys: int64 ``[B]``, :func:`elle_mp.ops.dropout.sample_keys`.
        runs: the positions of the queries among those of the keys; ``None`` when they are the same.
    """
    heads, groups = q.shape[2], k.shape[2]
    spans = [range(k.shape[1])] if runs is None else runs
    positions = torch.cat([torch.arange(span.start, span.stop, device=q.device) for span in spans])
    kv_map = torch.arange(heads) // (heads // groups)
    seen = _intervals(q.shape[0], k.shape[1], positions, causal)
    numbers = first_head, threshold(dropout), q.shape[-1] ** -0.5
    out: Tensor = _KERNELS.expanded_attention(q, k, v, kv_map, seen, keys.to(q.device), positions, *numbers)[0]
    return out


def packed_attention_kernel(qkv: Tensor, causal: bool, dropout: float, keys: Tensor, first_head: int) -> Tensor:
    """Attention of a fused projection ``[B, S, G, H / G + 2, D]``: ``[B, S, H, D]``; its gradient is one tensor.

    Only where :func:`has_kernel` says so. ``keys``: int64 ``[B]``, :func:`elle_mp.ops.dropout.sample_keys`.
    """
    batch, length = qkv.shape[:2]
    positions = torch.arange(length, device=qkv.device)
    seen = _intervals(batch, length, positions, causal)
    numbers = first_head, threshold(dropout), qkv.shape[-1] ** -0.5
    out: Tensor = _KERNELS.packed_attention(qkv, seen, keys.to(qkv.device), positions, *numbers)[0]
    return out


def has_kernel(x: Tensor) -> bool:
    """Whether the compiled kernels take tensors like ``x``."""
    if _KERNELS is None or x.dtype not in KERNEL_TYPES.get(x.device.type, ()):
        return False
    return x.device.type == "cpu" or (x.shape[-1] <= CUDA_HEAD_DIM and cuda_ops("expanded_attention") is not None)


class _Shape:
    """Sizes, checked, and what follows from them."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, kv_map: Sequence[int] | None, positions: Tensor | None) -> None:
        if not (
            q.dim() == k.dim() == 4 and k.shape == v.shape and (q.shape[0], q.shape[3]) == (k.shape[0], k.shape[3])
        ):
            raise ValueError(f"expanded_attention: {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)} do not fit")
        self.batch, self.queries, self.heads, self.dim = q.shape
        self.keys, self.groups = k.shape[1:3]
        if kv_map is None:
            if self.groups == 0 or self.heads % self.groups:
                raise ValueError(f"expanded_attention: {self.heads} heads for {self.groups} want a kv_map")
            kv_map = [head // (self.heads // self.groups) for head in range(self.heads)]
        if len(kv_map) != self.heads or not all(0 <= group < self.groups for group in kv_map):
            raise ValueError(f"expanded_attention: kv_map {list(kv_map)} is not {self.heads} of {self.groups} heads")
        self.kv_map = list(kv_map)
        if positions is None:
            if self.queries > self.keys:
                raise ValueError(f"expanded_attention: {self.queries} queries and only {self.keys} keys")
            positions = torch.arange(self.keys - self.queries, self.keys, device=q.device)
        if positions.shape != (self.queries,):
            raise ValueError(f"expanded_attention: positions {tuple(positions.shape)} of {self.queries} queries")
        self.positions = positions

    def check_masks(self, doc_starts: Tensor | None, key_lengths: Tensor | None) -> None:
        """Raises ValueError where they are of other sequences."""
        if doc_starts is not None and doc_starts.shape != (self.batch, self.keys):
            raise ValueError(f"expanded_attention: doc_starts {tuple(doc_starts.shape)} is not [B, T]")
        if key_lengths is not None and key_lengths.shape != (self.batch,):
            raise ValueError(f"expanded_attention: key_lengths {tuple(key_lengths.shape)} is not [B]")


def seen_mask(
    shape: _Shape, causal: bool, prompt_length: int | Tensor, doc_starts: Tensor | None, key_lengths: Tensor | None
) -> Tensor:
    """Bool ``[B, Sq, T]``: what each query sees, from the definition."""
    at, column = shape.positions[:, None], torch.arange(shape.keys, device=shape.positions.device)
    mask = (column <= at if causal else column >= 0).expand(shape.batch, shape.queries, shape.keys)
    if doc_starts is not None:
        prompt = _per_sample(prompt_length, shape)
        own = doc_starts[:, None, :] == doc_starts[:, shape.positions, None]
        mask = mask & (own | (column < prompt[:, None, None]))
    if key_lengths is not None:
        mask = mask & (column < key_lengths[:, None, None])
    return mask


def seen_keys(
    shape: _Shape, causal: bool, prompt_length: int | Tensor, doc_starts: Tensor | None, key_lengths: Tensor | None
) -> Tensor:
    """int32 ``[B, Sq, 3]``: a query sees keys ``[0, x0)`` and ``[x1, x2)``; the same as :func:`seen_mask`."""
    if doc_starts is None:
        seen = _intervals(shape.batch, shape.keys, shape.positions, causal)
    else:
        at = shape.positions.expand(shape.batch, -1)
        starts = doc_starts.contiguous()
        begin = starts.gather(1, at)
        end = at + 1 if causal else torch.searchsorted(starts, begin, right=True)
        prompt = _per_sample(prompt_length, shape)[:, None]
        seen = torch.stack((torch.where(at < prompt, 0, prompt), begin, end), -1).to(torch.int32)
    if key_lengths is not None:
        seen = seen.minimum(key_lengths.to(torch.int32)[:, None, None])
    return seen.contiguous()


def _intervals(batch: int, keys: int, positions: Tensor, causal: bool) -> Tensor:
    """:func:`seen_keys` of whole sequences."""
    seen = torch.zeros(batch, len(positions), 3, dtype=torch.int32, device=positions.device)
    seen[:, :, 2] = positions + 1 if causal else keys
    return seen


def _per_sample(prompt_length: int | Tensor, shape: _Shape) -> Tensor:
    """int64 ``[B]``."""
    device = shape.positions.device
    prompt = torch.as_tensor(prompt_length, dtype=torch.int64, device=device).expand(shape.batch)
    return prompt


def _keys(batch: int, dropout: float, key: DropoutKey | None) -> Tensor:
    """int64 ``[B]``; zeros when nothing is dropped."""
    if threshold(dropout) == 0:
        return torch.zeros(batch, dtype=torch.int64)
    if key is None or key.samples.shape != (batch,):
        raise ValueError(f"attention with dropout {dropout} wants a key for {batch} sequences")
    return sample_keys(key)


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shape: _Shape,
    mask: Tensor,
    dropout: float,
    keys: Tensor,
    first_head: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = torch.einsum("bshd,bthd->bhst", q, k[:, :, shape.kv_map]).to(wide) * scale
    hidden = ~mask[:, None]
    # A finite stand-in where nothing is seen keeps infinities out of the gradient.
    lse = torch.logsumexp(scores.masked_fill(hidden, float("-inf")).masked_fill(~mask.any(-1)[:, None, :, None], 0), -1)
    weights = (scores - lse[..., None]).exp().masked_fill(hidden, 0.0)
    lse = lse.masked_fill(~mask.any(-1)[:, None], float("-inf"))
    if threshold(dropout):
        rows = keep_mask(keys.to(q.device), first_head * shape.keys, shape.heads * shape.keys, shape.keys, dropout)
        keep = rows.view(shape.batch, shape.heads, shape.keys, shape.keys)[:, :, shape.positions]
        weights = weights * keep.to(wide) * keep_scale(dropout)
    return torch.einsum("bhst,bthd->bshd", weights.to(v.dtype), v[:, :, shape.kv_map]), lse


def _register() -> Any:
    """The compiled ops, with fake tensors and autograd, or ``None``."""
    names = ("expanded_attention", "packed_attention")
    ops = compiled_ops(*names, *(f"{name}_backward" for name in names))
    if ops is None:
        return None

    @torch.library.register_fake("elle_mp::expanded_attention")
    def _(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        batch, queries, heads, _ = q.shape
        return q.new_empty(q.shape), q.new_empty(batch, heads, queries, dtype=torch.float32)

    @torch.library.register_fake("elle_mp::expanded_attention_backward")
    def _(grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, ...]:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    @torch.library.register_fake("elle_mp::packed_attention")
    def _(qkv: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        batch, length, groups, slots, dim = qkv.shape
        heads = groups * (slots - 2)
        return qkv.new_empty(batch, length, heads, dim), qkv.new_empty(batch, heads, length, dtype=torch.float32)

    @torch.library.register_fake("elle_mp::packed_attention_backward")
    def _(grad: Tensor, grad_lse: Tensor | None, qkv: Tensor, *others: Any) -> Tensor:
        return qkv.new_empty(qkv.shape)

    for name, tensors in zip(names, (3, 1), strict=True):
        _register_autograd(name, tensors, getattr(ops, f"{name}_backward"))
    _register_flops(ops)
    return ops


def _register_flops(ops: Any) -> None:
    """Of shapes, and so for every pair of a query and a key: what is seen is in a tensor."""
    products = {"": 2, "_backward": 5}  # of a query, a key and their dim, twice each

    def separate(q: Sequence[int], k: Sequence[int], count: int) -> int:
        batch, queries, heads, dim = q
        return 2 * count * batch * heads * queries * k[1] * dim

    def packed(qkv: Sequence[int], count: int) -> int:
        batch, length, groups, slots, dim = qkv
        return 2 * count * batch * groups * (slots - 2) * length**2 * dim

    for suffix, count in products.items():
        first = 2 if suffix else 0  # behind the gradients
        register_flop_formula(getattr(ops, f"expanded_attention{suffix}"))(
            lambda *shapes, first=first, count=count, **_: separate(shapes[first], shapes[first + 1], count)
        )
        register_flop_formula(getattr(ops, f"packed_attention{suffix}"))(
            lambda *shapes, first=first, count=count, **_: packed(shapes[first], count)
        )


def _register_autograd(name: str, tensors: int, backward_op: Any) -> None:
    """``tensors``: how many arguments have a gradient; the last three are numbers."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:tensors], *output, *inputs[tensors:-3])
        ctx.numbers = inputs[-3:]

    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        grad = torch.zeros_like(saved[tensors]) if grad is None else grad
        found = backward_op(grad, grad_lse, *saved, *ctx.numbers)
        gradients = (found,) if tensors == 1 else found
        return (*gradients, *([None] * (len(saved) - tensors - 2 + 3)))

    torch.library.register_autograd(f"elle_mp::{name}", backward, setup_context=setup)


_KERNELS = _register()
