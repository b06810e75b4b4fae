"""The hidden states in front of the first layer in one pass: tokens, domain prompts and positions, norm, dropout.

The kernel (``csrc/ops/embedding_rows.h``: CPU, fp32 and bf16) gives bit for bit what lookups, sum, norm and dropout
give one after the other. The gradient of a table sums rows of hidden states in fp32 in their order, every entry by one
thread (ids are sorted by counting), so it is the same for every number of threads.

Of a table that is cut over tensor-parallel ranks a rank has some rows only, and norm and dropout act on the sum over
ranks. There the model takes :func:`elle_mp.ops.embedding.lookup` and that sum, and adds prompts and positions once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from elle_mp.ops.dropout import DropoutKey, dropout, sample_keys, threshold
from elle_mp.ops.embedding import lookup
from elle_mp.ops.library import compiled_ops
from elle_mp.ops.norms import layer_norm

KERNEL_TYPES = (torch.float32, torch.bfloat16)
"""Types of tables that the kernel takes, on the CPU."""

Gain = tuple[Tensor, Tensor, float, "Tensor | None"]
"""A LayerNorm: weight and bias ``[D]``, eps, and the weights ``[D]`` of its statistics or ``None``."""


def prompt_embedding(
    table: Tensor,
    ids: Tensor,
    runs: Sequence[range],
    *,
    position_table: Tensor | None = None,
    prompt_table: Tensor | None = None,
    domains: Tensor | None = None,
    norm: Gain | None = None,
    p: float = 0.0,
    key: DropoutKey | None = None,
) -> Tensor:
    """``dropout(norm(rows + positions))`` of prompts and tokens.

    Args:
        table: ``[V, D]``.
        ids: int64 ``[B, T]`` of the tokens; those that are not in the table give rows of zeros.
        runs: the positions ``R`` that are wanted, in their order and behind the prompt ``T`` of them; the runs are
            equally long.
        position_table: ``[L, D]``.
        prompt_table: ``[domains, P, D]``: what stands at the positions below ``P``.
        domains: int64 ``[B]``, with a prompt table.
        norm: none: no norm.
        p, key: of the dropout, as of :func:`elle_mp.ops.dropout.dropout`; without a key nothing is dropped.

    Returns:
        ``[B, R, D]`` in the type of the tables.

    Raises:
        ValueError: the tokens are not those of the positions, the key is for other sequences, or ``p`` out of range.
        RuntimeError: a position or a domain that is not in its table (IndexError without the kernel).
    """
    _check(ids, runs, prompt_table)
    if not has_kernel(table):
        return prompt_embedding_reference(
            table,
            ids,
            runs,
            position_table=position_table,
            prompt_table=prompt_table,
            domains=domains,
            norm=norm,
            p=p,
            key=key,
        )
    level = 0 if key is None else threshold(p)
    if key is not None and key.samples.shape != ids.shape[:1]:
        raise ValueError(f"prompt_embedding: {len(key.samples)} dropout keys for {len(ids)} sequences")
    keys = None if key is None or level == 0 else sample_keys(key)
    at = torch.cat([torch.arange(run.start, run.stop) for run in runs]) if runs else torch.empty(0, dtype=torch.int64)
    weight, bias, eps, stat_weights = (None, None, 0.0, None) if norm is None else norm
    tables = (x if x is None else x.contiguous() for x in (table, prompt_table, position_table))
    out: Tensor = _KERNELS.prompt_embedding(
        *tables, weight, bias, ids.contiguous(), at, domains, stat_weights, keys, 0, level, eps
    )[0]
    return out


def prompt_embedding_reference(
    table: Tensor,
    ids: Tensor,
    runs: Sequence[range],
    *,
    position_table: Tensor | None = None,
    prompt_table: Tensor | None = None,
    domains: Tensor | None = None,
    norm: Gain | None = None,
    p: float = 0.0,
    key: DropoutKey | None = None,
) -> Tensor:
    """:func:`prompt_embedding` in plain PyTorch, one operation after the other. It defines the op."""
    x = lookup(table, ids)
    at = [position for run in runs for position in run]
    if prompt_table is not None and domains is not None:
        here = [position for position in at if position < prompt_table.shape[1]]
        x = torch.cat((prompt_table[domains][:, here], x), 1)
    if position_table is not None:
        x = x + position_table[at]
    if norm is not None:
        x = layer_norm(x, *norm)
    return x if key is None else dropout(x, p, key, [run.start for run in runs])


def has_kernel(table: Tensor) -> bool:
    """Whether the compiled kernel takes tables like ``table``."""
    return _KERNELS is not None and table.device.type == "cpu" and table.dtype in KERNEL_TYPES


def _check(ids: Tensor, runs: Sequence[range], prompt_table: Tensor | None) -> None:
    prompt = 0 if prompt_table is None else prompt_table.shape[1]
    text = sum(max(0, run.stop - max(run.start, prompt)) for run in runs)
    if ids.dim() != 2 or ids.shape[1] != text:
        raise ValueError(f"prompt_embedding: ids {tuple(ids.shape)} for {text} positions behind the prompt")


def _register() -> Any:
    """The compiled ops, with fake tensors and autograd, or ``None``."""
    ops = compiled_ops("prompt_embedding", "prompt_embedding_backward")
    if ops is None:
        return None

    @torch.library.register_fake("elle_mp::prompt_embedding")
    def _(table: Tensor, prompts: Tensor | None, places: Tensor | None, *others: Any) -> tuple[Tensor, Tensor]:
        weight, _, ids, at = others[:4]
        rows = 0 if weight is None else ids.shape[0] * at.shape[0]
        out = table.new_empty(ids.shape[0], at.shape[0], table.shape[1])
        return out, table.new_empty(2, rows, dtype=torch.float32)

    @torch.library.register_fake("elle_mp::prompt_embedding_backward")
    def _(dy: Tensor, statistics: Tensor | None, table: Tensor, *others: Any) -> tuple[Tensor, ...]:
        tables = (table.new_empty((0,) if x is None else x.shape) for x in (table, *others[:2]))
        columns = 0 if others[2] is None else table.shape[1]
        return (*tables, table.new_empty(2, columns, dtype=torch.float32))

    torch.library.register_autograd("elle_mp::prompt_embedding", _backward, setup_context=_setup)
    return ops


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tables, (weight, bias), others, ctx.numbers = inputs[:3], inputs[3:5], inputs[5:10], inputs[10:12]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(output[1], *tables, weight, *others)


def _backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 13
    *tables, sums = _KERNELS.prompt_embedding_backward(dy.contiguous(), *ctx.saved_tensors, *ctx.numbers)
    weight, needs = ctx.saved_tensors[4], ctx.needs_input_grad
    d_tables = (x if need else None for x, need in zip(tables, needs, strict=False))
    d_weight = sums[0].to(weight.dtype) if needs[3] else None
    return (*d_tables, d_weight, sums[1].to(ctx.bias_dtype) if needs[4] else None, *([None] * 8))


_KERNELS = _register()
