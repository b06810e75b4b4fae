"""LayerNorm, with weighted statistics where a grown model needs them, and RMSNorm; the residual sum and the dropout in
front of them in the same pass.

The kernels (``csrc/ops/norm_rows.h``: CPU, fp32 and bf16) give bit for bit what dropout, sum and norm give one after
the other; ``csrc/cuda/norms.cu`` (GPUs, fp16, too) rounds in the same places and sums in another order. Statistics are
in fp32; sums over rows are made in blocks that do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elle_mp.ops.apex import Apex
from elle_mp.ops.dropout import DropoutKey, dropout, run_keys, threshold
from elle_mp.ops.library import compiled_ops, cuda_ops

KERNEL_TYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
"""Types of hidden states that the kernels of each kind of device take."""

CUDA_COLUMNS = 24 << 10
"""Most columns that the CUDA kernels take."""


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, stat_weights: Tensor | None = None, apex: Apex | None = None
) -> Tensor:
    """LayerNorm (arXiv 1607.06450) over the last dimension; statistics in fp32 (fp64 for fp64 input).

    Args:
        x: ``[..., D]``.
        weight, bias: ``[D]``.
        stat_weights: ``[D]``, non-negative, of sum 1, a constant (no gradient). Then the mean is ``sum w x``
            and the variance ``sum w (x - mean)^2``: the count-weighted statistics that keep a grown LayerNorm
            exact (growth.md, section 1.1). ``None`` is the ordinary ``w = 1 / D``.
        apex: whose kernel is taken for ordinary statistics; ours, or torch's, without.

    Returns:
        ``[..., D]`` in the type of ``x``.
    """
    if apex is not None and stat_weights is None:
        return apex.layer_norm(x, weight.to(x.dtype), bias.to(x.dtype), (x.shape[-1],), eps)
    # On a GPU torch's own norm stays where nothing is weighted: nobody has measured ours there.
    if has_kernel(x) and (x.device.type == "cpu" or stat_weights is not None):
        return _add_norm(x, None, weight, bias, stat_weights, eps, 0.0, None, 0)[0]
    return _plain_layer_norm(x, weight, bias, eps, stat_weights)


def rms_norm(x: Tensor, weight: Tensor, eps: float, apex: Apex | None = None) -> Tensor:
    """RMSNorm (arXiv 1910.07467) over the last dim of ``x [..., D]``; statistics in fp32 (fp64 for fp64).

    Args:
        apex: whose kernel is taken; ours without.
    """
    if apex is not None:
        return apex.rms_norm(x, weight.to(x.dtype), (x.shape[-1],), eps)
    if has_kernel(x):
        return _add_norm(x, None, weight, None, None, eps, 0.0, None, 0, rms=True)[0]
    return _plain_rms_norm(x, weight, eps)


def weighted_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    stat_weights: Tensor | None = None,
    *,
    p: float = 0.0,
    key: DropoutKey | None = None,
    first_row: int | Sequence[int] = 0,
) -> tuple[Tensor, Tensor]:
    """``h = residual + dropout(x)`` and its :func:`layer_norm` in one pass over memory.

    Args:
        x, residual: ``[B, S, D]``, one type.
        weight, bias, eps, stat_weights: as of :func:`layer_norm`.
        p, key, first_row: as of :func:`elle_mp.ops.dropout.dropout`; without a key nothing is dropped.

    Returns:
        The norm and ``h``, both ``[B, S, D]`` and with a gradient.

    Raises:
        ValueError: shapes or types do not fit, or as of dropout.
    """
    _check(x, residual)
    if has_kernel(x):
        return _add_norm(x, residual, weight, bias, stat_weights, eps, p, key, first_row)
    return weighted_layer_norm_reference(
        x, residual, weight, bias, eps, stat_weights, p=p, key=key, first_row=first_row
    )


def weighted_layer_norm_reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    stat_weights: Tensor | None = None,
    *,
    p: float = 0.0,
    key: DropoutKey | None = None,
    first_row: int | Sequence[int] = 0,
) -> tuple[Tensor, Tensor]:
    """:func:`weighted_layer_norm` in plain PyTorch, one operation after the other. It defines the op."""
    h = residual + (x if key is None else dropout(x, p, key, first_row))
    return _plain_layer_norm(h, weight, bias, eps, stat_weights), h


def residual_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    p: float = 0.0,
    key: DropoutKey | None = None,
    first_row: int | Sequence[int] = 0,
) -> tuple[Tensor, Tensor]:
    """:func:`weighted_layer_norm` with :func:`rms_norm` instead."""
    _check(x, residual)
    if has_kernel(x):
        return _add_norm(x, residual, weight, None, None, eps, p, key, first_row, rms=True)
    return residual_rms_norm_reference(x, residual, weight, eps, p=p, key=key, first_row=first_row)


def residual_rms_norm_reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    p: float = 0.0,
    key: DropoutKey | None = None,
    first_row: int | Sequence[int] = 0,
) -> tuple[Tensor, Tensor]:
    """:func:`residual_rms_norm` in plain PyTorch. It defines the op."""
    h = residual + (x if key is None else dropout(x, p, key, first_row))
    return _plain_rms_norm(h, weight, eps), h


def has_kernel(x: Tensor) -> bool:
    """Whether the compiled kernels take hidden states like ``x``."""
    if _KERNELS is None or x.dtype not in KERNEL_TYPES.get(x.device.type, ()):
        return False
    return x.device.type == "cpu" or (x.shape[-1] <= CUDA_COLUMNS and cuda_ops("add_norm") is not None)


def _check(x: Tensor, residual: Tensor) -> None:
    if x.shape != residual.shape or x.dtype != residual.dtype:
        shapes = f"{tuple(x.shape)} {x.dtype}, {tuple(residual.shape)} {residual.dtype}"
        raise ValueError(f"norm of a sum: x and residual do not fit: {shapes}")


def _add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stat_weights: Tensor | None,
    eps: float,
    p: float,
    key: DropoutKey | None,
    first_row: int | Sequence[int],
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    """The kernel: the norm and ``h``, which is empty where it is ``x``."""
    level = 0 if key is None else threshold(p)
    keys, row = (None, 0) if key is None or level == 0 else run_keys(x, key, first_row)
    keys = None if keys is None else keys.to(x.device)
    residual = None if residual is None else residual.contiguous()
    y, h, _ = _KERNELS.add_norm(x.contiguous(), residual, weight, bias, stat_weights, keys, row, level, eps, rms)
    return y, h


def _plain_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, stat_weights: Tensor | None) -> Tensor:
    if stat_weights is None:
        return F.layer_norm(x, (x.shape[-1],), weight.to(x.dtype), bias.to(x.dtype), eps)
    out: Tensor = _WeightedLayerNorm.apply(x, weight, bias, stat_weights, eps)
    return out


def _plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out: Tensor = _RmsNorm.apply(x, weight, eps)
    return out


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _over_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).sum(0)


class _WeightedLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, stat_weights: Tensor, eps: float) -> Tensor:
        wide = _wide(x)
        w = stat_weights.to(wide.dtype)
        centred = wide - (wide @ w)[..., None]
        rstd = torch.rsqrt(centred.square() @ w + eps)[..., None]
        ctx.save_for_backward(x, weight, w, rstd)
        ctx.bias_dtype = bias.dtype
        return centred.mul_(rstd).mul_(weight).add_(bias).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, w, rstd = ctx.saved_tensors
        wide, dy = _wide(x), _wide(grad)
        normal = (wide - (wide @ w)[..., None]).mul_(rstd)
        d_weight = _over_rows(dy * normal).to(weight.dtype) if ctx.needs_input_grad[1] else None
        d_bias = _over_rows(dy).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        if not ctx.needs_input_grad[0]:
            return None, d_weight, d_bias, None, None
        dn = dy * weight
        # d mean / d x_i = w_i and d var / d x_i = 2 w_i (x_i - mean), because sum w (x - mean) = 0.
        along = (dn * normal).sum(-1, keepdim=True)
        dx = dn.sub_((normal.mul_(along).add_(dn.sum(-1, keepdim=True))).mul_(w)).mul_(rstd)
        return dx.to(x.dtype), d_weight, d_bias, None, None


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = _wide(x)
        rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, rstd)
        return (wide * rstd).mul_(weight).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        normal, dy = _wide(x) * rstd, _wide(grad)
        d_weight = _over_rows(dy * normal).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, d_weight, None
        dn = dy * weight
        along = (dn * normal).mean(-1, keepdim=True)
        return dn.sub_(normal.mul_(along)).mul_(rstd).to(x.dtype), d_weight, None


def _register() -> Any:
    """The compiled ops, with fake tensors and autograd, or ``None``."""
    ops = compiled_ops("add_norm", "add_norm_backward")
    if ops is None:
        return None

    @torch.library.register_fake("elle_mp::add_norm")
    def _(x: Tensor, residual: Tensor | None, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
        level, rows = others[5], x.numel() // x.shape[-1] if x.shape[-1] else 0
        h = x.new_empty(x.shape) if residual is not None or level else x.new_empty(0)
        return x.new_empty(x.shape), h, x.new_empty(2, rows, dtype=torch.float32)

    @torch.library.register_fake("elle_mp::add_norm_backward")
    def _(dy: Tensor, dh: Tensor | None, h: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
        d_x = h.new_empty(h.shape if others[5] else (0,))
        return h.new_empty(h.shape), d_x, h.new_empty(2, h.shape[-1], dtype=torch.float32)

    torch.library.register_autograd("elle_mp::add_norm", _backward, setup_context=_setup)
    return ops


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, residual, weight, bias, stat_weights, keys, *ctx.numbers = inputs
    _, h, statistics = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(statistics)
    ctx.adds = residual is not None or ctx.numbers[1] > 0
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(h if ctx.adds else x, weight, stat_weights, statistics, keys)


def _backward(ctx: Any, dy: Tensor | None, dh: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    h, weight, stat_weights, statistics, keys = ctx.saved_tensors
    first_row, level, _, rms = ctx.numbers
    dy = torch.zeros_like(h) if dy is None else dy.contiguous()
    dh = dh.contiguous() if dh is not None and ctx.adds else None
    d_residual, d_x, sums = _KERNELS.add_norm_backward(
        dy, dh, h, weight, stat_weights, statistics, keys, first_row, level, rms
    )
    d_weight = sums[0].to(weight.dtype) if ctx.needs_input_grad[2] else None
    d_bias = sums[1].to(ctx.bias_dtype) if ctx.needs_input_grad[3] else None
    residual = d_residual if ctx.needs_input_grad[1] else None
    return (d_x if level else d_residual, residual, d_weight, d_bias, *([None] * 6))


_KERNELS = _register()
