"""Rows of a table that may be cut over the vocabulary, with a gradient summed in fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from elle_mp.ops.library import cuda_ops


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor, start: int) -> Tensor:
        local = ids.reshape(-1) - start
        inside = (local >= 0) & (local < table.shape[0])
        whole = bool(inside.all())
        rows = table.index_select(0, local if whole else local.clamp(0, table.shape[0] - 1))
        if not whole:
            rows.masked_fill_(~inside[:, None], 0)
        ctx.save_for_backward(local, None if whole else inside)
        ctx.table_shape, ctx.dtype = table.shape, table.dtype
        return rows.view(*ids.shape, table.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        local, inside = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        ops = cuda_ops("embedding_gradient") if grad.is_cuda else None
        if ops is not None:  # index_add_ would sum in another order each time
            ascending, order = local.sort(stable=True)
            found = ops.embedding_gradient(rows.contiguous(), ascending, order, ctx.table_shape[0])
            return found.to(ctx.dtype), None, None
        if inside is not None:
            chosen = inside.nonzero().squeeze(1)
            local, rows = local.index_select(0, chosen), rows.index_select(0, chosen)
        # Frequent tokens sum thousands of rows: bf16 would lose most of them.
        wide = torch.float64 if ctx.dtype == torch.float64 else torch.float32
        out = torch.zeros(ctx.table_shape, dtype=wide, device=grad.device)
        out.index_add_(0, local, rows.to(wide))
        return out.to(ctx.dtype), None, None


def lookup(table: Tensor, ids: Tensor, start: int = 0) -> Tensor:
    """Rows ``ids`` of a vocabulary-cut table.

    Args:
        table: ``[V_local, D]``, the rows ``start`` to ``start + V_local`` of the whole table.
        ids: int64 of any shape, global ids; those of other ranks give rows of zeros (sum over the ranks).

    Returns:
        ``[*ids.shape, D]``.
    """
    out: Tensor = _Lookup.apply(table, ids, start)
    return out
