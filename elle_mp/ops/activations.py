"""GELU (arXiv 1606.08415), compiled for bf16 on the CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elle_mp.ops.native import as_array, helpers


def gelu(x: Tensor, tanh: bool = False) -> Tensor:
    """Multiplies x by the normal distribution function at x.

    Args:
        x: any shape and strides.
        tanh: GPT-2's approximation by the hyperbolic tangent, instead of the exact function (BERT).
    """
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or helpers("gelu") is None:
        return F.gelu(x, approximate="tanh" if tanh else "none")
    out: Tensor = _Gelu.apply(x, tanh)
    return out


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tanh: bool) -> Tensor:
        native = helpers("gelu")
        assert native is not None
        x = x.contiguous()
        ctx.save_for_backward(x)
        ctx.tanh = tanh
        out = torch.empty_like(x)
        native.gelu(as_array(x), as_array(out), tanh, torch.get_num_threads())
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        native = helpers("gelu_backward")
        assert native is not None
        out = torch.empty_like(x)
        arrays = (as_array(x), as_array(grad.contiguous()), as_array(out))
        native.gelu_backward(*arrays, ctx.tanh, torch.get_num_threads())
        return out, None
