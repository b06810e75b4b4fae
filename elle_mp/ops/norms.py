"""LayerNorm, with weighted statistics where a grown model needs them, and RMSNorm."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elle_mp.ops.apex import Apex


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
        apex: whose kernel is taken for ordinary statistics; torch's without.

    Returns:
        ``[..., D]`` in the type of ``x``.
    """
    if stat_weights is None:
        if apex is None:
            return F.layer_norm(x, (x.shape[-1],), weight.to(x.dtype), bias.to(x.dtype), eps)
        return apex.layer_norm(x, weight.to(x.dtype), bias.to(x.dtype), (x.shape[-1],), eps)
    out: Tensor = _WeightedLayerNorm.apply(x, weight, bias, stat_weights, eps)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float, apex: Apex | None = None) -> Tensor:
    """RMSNorm (arXiv 1910.07467) over the last dim of ``x [..., D]``; statistics in fp32 (fp64 for fp64).

    Args:
        apex: whose kernel is taken; ours without.
    """
    if apex is not None:
        return apex.rms_norm(x, weight.to(x.dtype), (x.shape[-1],), eps)
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
