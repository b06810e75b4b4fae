"""Autograd collectives of tensor parallelism: Megatron's f and g (Shoeybi et al., arXiv 1909.08053, section 3)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _CopyToTensorParallel(torch.autograd.Function):
    """f: the identity forward; backward sums the gradients of the ranks' parts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _ReduceFromTensorParallel(torch.autograd.Function):
    """g: sums the ranks' partial results forward; the identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def copy_to_tp(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Enters a tensor-parallel region: every rank of ``group`` reads the same ``x``, each for its own part."""
    return x if group is None else _CopyToTensorParallel.apply(x, group)


def reduce_from_tp(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Leaves a tensor-parallel region: the sum of the ranks' parts, the same on every rank of ``group``."""
    return x if group is None else _ReduceFromTensorParallel.apply(x, group)
