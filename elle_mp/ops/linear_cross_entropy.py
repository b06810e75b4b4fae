"""The last projection and the cross entropy in one op, so that the logits ``[N, V]`` never exist at once.

The gradient is formed in the forward pass, chunk by chunk, while the chunk's logits are still there (as in Liger
Kernel, arXiv 2410.10989, and Cut Cross-Entropy, arXiv 2411.09009). PyTorch does the matrix products; what is between
them is ``csrc/ops/cross_entropy_rows.h`` on the CPU, in fp32 and bf16, and ``csrc/cuda/cross_entropy.cu`` on GPUs, in
fp16, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]
from torch.utils.flop_counter import register_flop_formula

from elle_mp.ops.library import compiled_ops, cuda_ops

KERNEL_TYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
"""Types of logits that the kernels of each kind of device take."""
IGNORED = -100
"""PyTorch's target that does not count."""
CHUNK_BYTES = 16 << 20
"""Logits of one chunk on a CPU: what stays in a cache. Twice that for a table whose gradient does not stay there, since
every chunk adds to the whole of it, and with fewer rows to a chunk that would be what takes the time."""
GPU_CHUNK_BYTES = 512 << 20
TABLE_BLOCK = 4096
"""Rows of the table whose gradient is made at a time where it is summed in another type than it is computed in."""


def linear_cross_entropy(
    hidden: Tensor,
    table: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    ignore_index: int = IGNORED,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Sum over rows of ``-sum_v p_v log softmax(x)_v + z_loss * logsumexp(x)^2`` with ``x = hidden @ table.T + bias``.

    ``p`` is 1 at the target; with label smoothing ``e`` it is ``1 - e`` there, and ``e / V`` more at every id. The
    second term keeps logits from drifting (PaLM, arXiv 2204.02311, section 5).

    Args:
        hidden: ``[N, D]``, the same on every rank of ``group``.
        table: ``[V_local, D]``, rows ``vocab_start`` onward of the whole table, in the type of ``hidden``.
        targets: int64 ``[N]``, global ids in ``[0, vocab_size)``, or ``ignore_index``.
        bias: ``[V_local]`` or ``None``.
        vocab_size: ids from here on are padding and get no probability; default: no padding.
        ignore_index: rows of this target count nothing, and get no gradient.
        label_smoothing: in [0, 1).
        z_loss: not negative.
        group: the ranks that hold the other rows, or ``None`` when this is the whole table.

    Returns:
        The sum, a scalar: fp32 (fp64 for fp64 input), the same on every rank. The gradient of ``hidden`` is
        this rank's part of the sum over ranks: the caller all-reduces it. The upstream gradient must be the
        same on every rank.

    Raises:
        ValueError: sizes or numbers do not fit.
    """
    numbers = _numbers(table, vocab_start, vocab_size, label_smoothing, z_loss)
    shapes = (tuple(hidden.shape), tuple(table.shape), tuple(targets.shape))
    if not (hidden.dim() == table.dim() == 2 and shapes[0][1] == shapes[1][1] and shapes[2] == shapes[0][:1]):
        raise ValueError(f"linear_cross_entropy: hidden, table and targets {shapes} do not fit")
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, table, bias)]
    name = None if group is None else group.group_name
    loss, *_ = _OP(hidden, table, bias, targets, *numbers, ignore_index, label_smoothing, z_loss, name, needs)
    return loss  # type: ignore[no-any-return]


def linear_cross_entropy_reference(
    hidden: Tensor,
    table: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    ignore_index: int = IGNORED,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """:func:`linear_cross_entropy` of a whole table spelled out: all logits are in memory. It defines the op."""
    valid, _ = _numbers(table, vocab_start, vocab_size, label_smoothing, z_loss)[1:]
    wide = _wide(hidden)
    logits = F.linear(hidden, table, bias)[:, :valid].to(wide)
    kept = targets != ignore_index
    losses = F.cross_entropy(
        logits,
        torch.where(kept, targets - vocab_start, IGNORED),
        ignore_index=IGNORED,
        label_smoothing=label_smoothing,
        reduction="sum",
    )
    return losses + z_loss * (logits.logsumexp(1).square() * kept).sum()


def chunk_rows(rows: int, table: tuple[int, int], itemsize: int, limit: int | None = None) -> int:
    """Rows to a chunk, all chunks about equal: their logits take at most ``limit`` bytes, or are of 64 rows.

    Args:
        table: ``(V_local, D)``.
        limit: what is best on a CPU when not given.
    """
    vocabulary, size = table
    if limit is None:
        limit = CHUNK_BYTES * (2 if vocabulary * size * 4 > 2 * CHUNK_BYTES else 1)
    most = max(64, limit // max(1, vocabulary * itemsize))
    chunks = -(-rows // most)
    return -(-rows // max(1, chunks))


def _numbers(
    table: Tensor, start: int, vocab_size: int | None, smoothing: float, z_loss: float
) -> tuple[int, int, int]:
    """First id of the table, number of its rows that are no padding, and size of the vocabulary."""
    size = start + table.shape[0] if vocab_size is None else vocab_size
    if not 0.0 <= smoothing < 1.0 or z_loss < 0.0:
        raise ValueError(f"linear_cross_entropy: label_smoothing {smoothing} or z_loss {z_loss} is out of range")
    return start, min(max(size - start, 0), table.shape[0]), size


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class _Loss:
    """What the loss of a row is, given its logits."""

    start: int
    size: int
    ignored: int
    smoothing: float
    z_loss: float
    group: dist.ProcessGroup | None

    def rows(self, logits: Tensor, targets: Tensor, gradient: bool) -> Tensor:
        """Losses ``[n]`` of a chunk; with ``gradient`` the logits become their gradient."""
        local = torch.where(targets == self.ignored, -1, targets - self.start)
        kept = targets != self.ignored
        top, total, picked, plain = logit_statistics(logits, local)
        if self.group is not None:
            mine = top.clone()
            dist.all_reduce(top, dist.ReduceOp.MAX, group=self.group)
            sums = torch.stack((total * (mine - top).exp(), picked, *((plain,) if self.smoothing else ())))
            dist.all_reduce(sums, group=self.group)
            total, picked, plain = sums[0], sums[1], sums[-1]
        lse = total.log() + top
        hit, uniform = 1.0 - self.smoothing, self.smoothing / self.size
        losses = lse + self.z_loss * lse.square() - hit * picked
        if self.smoothing:
            losses = losses - uniform * plain
        if gradient:
            logit_gradient(logits, local, lse, torch.where(kept, 1.0 + 2.0 * self.z_loss * lse, 0.0), hit, uniform)
        return torch.where(kept, losses, 0.0)


class _TableSum:
    """The sum over chunks of the table's gradient: in fp32 (fp64 for fp64), or at once where there is one chunk."""

    def __init__(self, table: Tensor, valid: int, chunks: int) -> None:
        self._table, self._valid = table, valid
        dtype = table.dtype if chunks == 1 else _wide(table)
        self._sum = torch.empty(table.shape, dtype=dtype, device=table.device)
        self._sum[valid if chunks else 0 :] = 0.0
        self._begun = False

    def add(self, gradient: Tensor, hidden: Tensor) -> None:
        """Adds ``gradient.T @ hidden`` of a chunk."""
        into = self._sum[: self._valid]
        beta, self._begun = float(self._begun), True
        if self._sum.dtype == gradient.dtype:
            torch.addmm(into, gradient.t(), hidden, beta=beta, out=into)
            return
        part = hidden.new_empty(min(self._valid, TABLE_BLOCK), hidden.shape[1])
        for begin in range(0, self._valid, TABLE_BLOCK):
            block = into[begin : begin + TABLE_BLOCK]
            made = torch.mm(gradient[:, begin : begin + TABLE_BLOCK].t(), hidden, out=part[: block.shape[0]])
            block.add_(made) if beta else block.copy_(made)

    def result(self) -> Tensor:
        """In the type of the table."""
        return self._sum.to(self._table.dtype)


def _chunks(rows: int, count: int) -> Iterator[slice]:
    return (slice(begin, min(begin + count, rows)) for begin in range(0, rows, max(1, count)))


def loss_and_gradients(
    hidden: Tensor,
    table: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    start: int,
    valid: int,
    size: int,
    ignored: int,
    smoothing: float,
    z_loss: float,
    group: str | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, and the gradients of hidden, table and bias for an upstream gradient of 1; empty where not needed."""
    ranks = None if group is None else _resolve_process_group(group)  # type: ignore[arg-type]
    loss = _Loss(start, size, ignored, smoothing, z_loss, ranks)
    limit = GPU_CHUNK_BYTES if hidden.is_cuda else None
    count = chunk_rows(hidden.shape[0], (valid, hidden.shape[1]), hidden.element_size(), limit)
    chunks = list(_chunks(hidden.shape[0], count))
    rows = table[:valid]
    d_hidden = torch.empty(hidden.shape if needs[0] else (0,), dtype=hidden.dtype, device=hidden.device)
    d_bias = torch.zeros(table.shape[:1] if needs[2] else (0,), dtype=_wide(hidden), device=hidden.device)
    d_table = _TableSum(table, valid, len(chunks)) if needs[1] else None
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    buffer = hidden.new_empty(count, valid)
    for part in chunks:
        h = hidden[part]
        logits = buffer[: h.shape[0]]
        if bias is None:
            torch.mm(h, rows.t(), out=logits)
        else:
            torch.addmm(bias[:valid], h, rows.t(), out=logits)
        total += loss.rows(logits, targets[part], any(needs)).sum(dtype=torch.float64)
        if needs[0]:
            torch.mm(logits, rows, out=d_hidden[part])
        if d_table is not None:
            d_table.add(logits, h)
        if needs[2]:
            d_bias[:valid] += logits.sum(0, dtype=d_bias.dtype)
    del buffer
    found = hidden.new_empty(0) if d_table is None else d_table.result()
    return total.to(_wide(hidden)), d_hidden, found, d_bias.to(hidden.dtype if bias is None else bias.dtype)


_OP = torch.library.custom_op("elle_mp::linear_cross_entropy", loss_and_gradients, mutates_args=())


@_OP.register_fake
def _(hidden: Tensor, table: Tensor, bias: Tensor | None, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs = others[-1]
    return (
        hidden.new_empty((), dtype=_wide(hidden)),
        hidden.new_empty(hidden.shape if needs[0] else (0,)),
        table.new_empty(table.shape if needs[1] else (0,)),
        table.new_empty(table.shape[:1] if needs[2] else (0,), dtype=hidden.dtype if bias is None else bias.dtype),
    )


@register_flop_formula(torch.ops.elle_mp.linear_cross_entropy)  # type: ignore[untyped-decorator]
def _flops(hidden: Sequence[int], table: Sequence[int], *others: Any, **_: Any) -> int:
    """Of shapes: the logits, and the gradients that were asked for."""
    valid, needs = others[3], others[-1]
    return 2 * hidden[0] * hidden[1] * int(valid) * (1 + needs[0] + needs[1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needs = inputs[-1]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    needs = [need and grad is not None for need in ctx.needs]
    gradients = (x * grad if need else None for x, need in zip(ctx.saved_tensors, needs, strict=True))
    return (*gradients, *([None] * 9))


_OP.register_autograd(_backward, setup_context=_setup)


def logit_statistics(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each row of logits ``[n, V]``: the largest, the sum of ``exp(logit - largest)``, the logit of the target (0
    where that is not in ``[0, V)``) and the sum; each ``[n]``, in fp32 (fp64 for fp64)."""
    if has_kernel(logits):
        top, total, picked, plain = _KERNELS.logit_statistics(logits, targets).unbind(0)
        return top, total, picked, plain
    wide, rows = _wide(logits), logits.shape[0]
    if logits.shape[1] == 0:
        lowest = torch.full((rows,), float("-inf"), dtype=wide, device=logits.device)
        zeros = lowest.new_zeros(3, rows)
        return lowest, zeros[0], zeros[1], zeros[2]
    inside = (targets >= 0) & (targets < logits.shape[1])
    place = targets.clamp(0, logits.shape[1] - 1)[:, None]
    picked = torch.where(inside, logits.gather(1, place).squeeze(1).to(wide), 0.0)
    top = logits.amax(1).to(wide)
    return top, (logits.to(wide) - top[:, None]).exp_().sum(1), picked, logits.sum(1, dtype=wide)


def logit_gradient(logits: Tensor, targets: Tensor, lse: Tensor, factors: Tensor, hit: float, uniform: float) -> None:
    """Logits ``[n, V]`` become ``factor * exp(logit - lse) - uniform``, less ``hit`` at the target; rows of factor 0
    become 0. ``lse`` and ``factors``: ``[n]``, in fp32 (fp64 for fp64)."""
    if has_kernel(logits):
        _KERNELS.logit_gradient(logits, targets, lse, factors, hit, uniform)
        return
    weights = (logits.to(lse.dtype) - lse[:, None]).exp_().mul_(factors[:, None]).sub_(uniform)
    if logits.shape[1]:
        inside = (targets >= 0) & (targets < logits.shape[1])
        place = targets.clamp(0, logits.shape[1] - 1)[:, None]
        weights.scatter_add_(1, place, -hit * inside.to(lse.dtype)[:, None])
    logits.copy_(weights.masked_fill_((factors == 0)[:, None], 0.0))


def has_kernel(logits: Tensor) -> bool:
    """Whether the compiled kernels take logits like these."""
    if _KERNELS is None or logits.dtype not in KERNEL_TYPES.get(logits.device.type, ()):
        return False
    return logits.device.type == "cpu" or cuda_ops("logit_statistics") is not None


def _register() -> Any:
    """The compiled ops, with fake tensors, or ``None``."""
    ops = compiled_ops("logit_statistics", "logit_gradient")
    if ops is None:
        return None

    @torch.library.register_fake("elle_mp::logit_statistics")
    def _(logits: Tensor, targets: Tensor) -> Tensor:
        return logits.new_empty(4, logits.shape[0], dtype=torch.float32)

    @torch.library.register_fake("elle_mp::logit_gradient")
    def _(logits: Tensor, *others: Any) -> None:
        return None

    return ops


_KERNELS = _register()
