"""The fused projection and cross entropy against F.cross_entropy, in one process and in two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from elle_mp.ops import linear_cross_entropy as module
from elle_mp.ops.linear_cross_entropy import (
    chunk_rows,
    has_kernel,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from tests.distributed_utils import run_distributed

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}


def inputs(rows: int, vocab: int, dtype: torch.dtype, size: int = 24) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + vocab)
    hidden, table, bias = (
        torch.randn(*shape, generator=generator).bfloat16().to(dtype)
        for shape in ((rows, size), (vocab, size), (vocab,))
    )
    return hidden, table * 0.25, bias, torch.randint(0, vocab - 3, (rows,), generator=generator)


def reference(hidden: Tensor, table: Tensor, bias: Tensor | None, targets: Tensor, vocab_size: int) -> Tensor:
    return F.cross_entropy(F.linear(hidden, table, bias)[:, :vocab_size], targets, reduction="sum")


def close(value: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(value.double(), expected, rtol=0, atol=tolerance * max(scale, 1e-30))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("rows", "vocab"), [(1, 16), (130, 40), (64, 1000), (200, 37)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_loss_and_gradients(
    path: str, dtype: torch.dtype, rows: int, vocab: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)  # so that there are several chunks
    hidden, table, bias, targets = inputs(rows, vocab, dtype)
    leaves = [item.clone().requires_grad_() for item in (hidden, table, bias)[: 3 if with_bias else 2]]
    loss = linear_cross_entropy(
        leaves[0], leaves[1], targets, bias=leaves[2] if with_bias else None, vocab_size=vocab - 3
    )
    (loss * 0.37).backward()
    exact = [item.double().requires_grad_() for item in (hidden, table, bias)[: len(leaves)]]
    expected = reference(exact[0], exact[1], exact[2] if with_bias else None, targets, vocab - 3)
    (expected * 0.37).backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close(loss.detach(), expected.detach(), min(TOLERANCE[dtype], 5e-3))
    for leaf, other in zip(leaves, exact, strict=True):
        assert leaf.grad is not None and other.grad is not None and leaf.grad.dtype == dtype
        close(leaf.grad, other.grad, TOLERANCE[dtype])
    table_gradient = leaves[1].grad
    assert table_gradient is not None and not table_gradient[vocab - 3 :].any()


def test_many_chunks_lose_nothing_in_bf16(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, table, bias, targets = inputs(4096, 64, torch.bfloat16)
    gradients = []
    for size in (1, 1 << 30):
        monkeypatch.setattr(module, "CHUNK_BYTES", size)
        leaf = table.clone().requires_grad_()
        linear_cross_entropy(hidden, leaf, targets, bias=bias).backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    close(gradients[0], gradients[1].double(), 1e-2)


def test_gradcheck() -> None:
    hidden, table, bias, targets = inputs(9, 11, torch.float64, size=4)
    leaves = tuple(item.requires_grad_() for item in (hidden, table, bias))
    assert torch.autograd.gradcheck(lambda h, t, b: linear_cross_entropy(h, t, targets, bias=b, vocab_size=8), leaves)


def test_no_targets_give_zero_and_zero_gradients(path: str) -> None:
    hidden = torch.empty(0, 24, dtype=torch.bfloat16, requires_grad=True)
    table = torch.randn(16, 24).bfloat16().requires_grad_()
    loss = linear_cross_entropy(hidden, table, torch.empty(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0.0 and table.grad is not None and not table.grad.any()


def test_only_what_is_needed_is_computed(path: str) -> None:
    hidden, table, bias, targets = inputs(70, 40, torch.bfloat16)
    with torch.no_grad():
        plain = linear_cross_entropy(hidden.requires_grad_(), table, targets, bias=bias)
    assert not plain.requires_grad
    loss = linear_cross_entropy(hidden, table, targets, bias=bias)
    assert loss.item() == plain.item()
    loss.backward()
    assert hidden.grad is not None and table.grad is None and bias.grad is None


def test_strides_change_nothing(path: str) -> None:
    hidden, table, bias, targets = inputs(70, 40, torch.bfloat16)
    wide = torch.empty(70, 48, dtype=torch.bfloat16)[:, ::2].copy_(hidden)
    expected = linear_cross_entropy(hidden, table, targets, bias=bias)
    assert torch.equal(linear_cross_entropy(wide, table, targets, bias=bias), expected)


OPTIONS: list[dict[str, float]] = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 0.02},
    {"label_smoothing": 0.3, "z_loss": 1e-3},
]

needs_kernels = pytest.mark.skipif(not has_kernel(torch.empty(0)), reason="the ops are not built")


@dataclass(frozen=True)
class Found:
    """A loss, and the gradients of hidden, table and bias."""

    loss: Tensor
    gradients: tuple[Tensor, ...]


def found(op: Callable[..., Tensor], tensors: Sequence[Tensor], targets: Tensor, **options: Any) -> Found:
    """Of three tensors, and targets some of which are ignored."""
    leaves = [item.detach().clone().requires_grad_() for item in tensors]
    loss = op(leaves[0], leaves[1], targets, bias=leaves[2], **options)
    return Found(loss.detach(), torch.autograd.grad(loss * 0.37, leaves))


def some_ignored(targets: Tensor, ignored: int) -> Tensor:
    return torch.where(torch.arange(len(targets)) % 3 == 1, ignored, targets)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("rows", "vocab"), [(1, 5), (130, 41), (70, 1003)])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
def test_options_at_every_level(
    level: str, dtype: torch.dtype, rows: int, vocab: int, options: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    *tensors, targets = inputs(rows, vocab, dtype)
    targets = some_ignored(targets, 7)
    arguments = {**options, "ignore_index": 7, "vocab_size": vocab - 3}
    ours = found(linear_cross_entropy, tensors, targets, **arguments)
    exact = found(linear_cross_entropy_reference, [item.double() for item in tensors], targets, **arguments)
    close(ours.loss, exact.loss, min(TOLERANCE[dtype], 5e-3))
    for mine, theirs in zip(ours.gradients, exact.gradients, strict=True):
        close(mine, theirs, TOLERANCE[dtype])
    assert not ours.gradients[0][targets == 7].any()


@pytest.mark.parametrize("options", OPTIONS[1:], ids="-".join)
def test_the_reference_is_the_definition(options: dict[str, float]) -> None:
    """Written out with probabilities."""
    hidden, table, bias, targets = inputs(20, 12, torch.float64)
    logits = hidden @ table.t() + bias
    smoothing = options.get("label_smoothing", 0.0)
    wanted = F.one_hot(targets, 12).double() * (1 - smoothing) + smoothing / 12
    expected = -(wanted * torch.log_softmax(logits, 1)).sum()
    expected += options.get("z_loss", 0.0) * logits.exp().sum(1).log().square().sum()
    torch.testing.assert_close(
        linear_cross_entropy_reference(hidden, table, targets, bias=bias, **options), expected, rtol=1e-12, atol=0
    )


def test_gradcheck_with_options() -> None:
    hidden, table, bias, targets = inputs(9, 11, torch.float64, size=4)
    leaves = tuple(item.requires_grad_() for item in (hidden, table, bias))
    options = {"vocab_size": 8, "label_smoothing": 0.2, "z_loss": 0.05, "ignore_index": int(targets[0])}
    assert torch.autograd.gradcheck(lambda h, t, b: linear_cross_entropy(h, t, targets, bias=b, **options), leaves)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_every_time(dtype: torch.dtype, two_threads: None) -> None:
    *tensors, targets = inputs(300, 1000, dtype)
    first = found(linear_cross_entropy, tensors, targets, z_loss=0.1)
    again = found(linear_cross_entropy, tensors, targets, z_loss=0.1)
    torch.set_num_threads(1)
    rows = module.logit_statistics(tensors[0] @ tensors[1].t(), targets)
    torch.set_num_threads(2)
    assert torch.equal(first.loss, again.loss)
    assert all(map(torch.equal, first.gradients, again.gradients))
    assert all(map(torch.equal, rows, module.logit_statistics(tensors[0] @ tensors[1].t(), targets)))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_rows_of_logits(level: str, dtype: torch.dtype) -> None:
    """Only the columns asked for are read and written."""
    logits = torch.randn(5, 64).to(dtype)
    targets, lse, factors = torch.tensor([0, 36, -1, 40, 3]), torch.randn(5).abs() + 3, torch.tensor([1.0, 2, 1, 0, 1])
    wide, narrow = logits.clone(), logits[:, :37].clone()
    for x in (wide[:, :37], narrow):
        module.logit_gradient(x, targets, lse, factors, 0.9, 0.01)
    assert torch.equal(wide[:, :37], narrow) and torch.equal(wide[:, 37:], logits[:, 37:])
    expected = factors[:, None] * (logits[:, :37].float() - lse[:, None]).exp() - 0.01
    expected[0, 0] -= 0.9
    expected[1, 36] -= 0.9
    expected[4, 3] -= 0.9
    expected[3] = 0.0
    close(narrow, expected.double(), 1e-2 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_opcheck(dtype: torch.dtype) -> None:
    hidden, table, bias, targets = inputs(9, 20, dtype)
    leaves = [item.requires_grad_() for item in (hidden, table, bias)]
    numbers = (0, 17, 17, -100, 0.1, 0.01, None, [True, True, True])
    torch.library.opcheck(torch.ops.elle_mp.linear_cross_entropy, (*leaves, targets, *numbers))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_of_the_passes(dtype: torch.dtype) -> None:
    logits, targets = torch.randn(6, 20).to(dtype), torch.tensor([0, 19, -1, 20, 3, 4])
    torch.library.opcheck(torch.ops.elle_mp.logit_statistics, (logits, targets))
    rows = torch.rand(6) + 2, torch.ones(6)
    torch.library.opcheck(torch.ops.elle_mp.logit_gradient, (logits, targets, *rows, 1.0, 0.0))


@needs_kernels
def test_what_does_not_fit_is_refused() -> None:
    logits, targets = torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64)
    for wrong in ((logits.t(), targets), (logits, targets[:3]), (logits, targets.int()), (logits.double(), targets)):
        with pytest.raises(RuntimeError):
            torch.ops.elle_mp.logit_statistics(*wrong)
    for options in ({"label_smoothing": 1.0}, {"z_loss": -0.1}):
        with pytest.raises(ValueError, match="out of range"):
            linear_cross_entropy(logits, logits, targets, **options)
    with pytest.raises(ValueError, match="do not fit"):
        linear_cross_entropy(logits, logits, targets[:3])


def test_chunks_are_about_equal() -> None:
    assert chunk_rows(2048, (32768, 768), 2) == 512
    assert chunk_rows(2100, (32768, 768), 2) == 420
    assert chunk_rows(2048, (32768, 16), 2) == 256
    assert chunk_rows(2048, (32768, 16), 2, 64 << 20) == 1024
    assert chunk_rows(10, (32768, 16), 2, 1) == 10
    assert chunk_rows(0, (32768, 16), 2) == 0


def on_a_rank(dtype: torch.dtype, vocab: int, vocab_size: int) -> list[Tensor]:
    """This rank's loss and gradients; half of the table each."""
    hidden, table, bias, targets = inputs(150, vocab, dtype)
    targets = targets % vocab_size
    rows = vocab // dist.get_world_size()
    start = dist.get_rank() * rows
    leaves = [
        item.clone().requires_grad_() for item in (hidden, table[start : start + rows], bias[start : start + rows])
    ]
    loss = linear_cross_entropy(
        leaves[0],
        leaves[1],
        targets,
        bias=leaves[2],
        vocab_start=start,
        vocab_size=vocab_size,
        group=dist.group.WORLD,
        label_smoothing=0.1,
        z_loss=0.01,
    )
    (loss * 0.5).backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("vocab_size", [40, 33, 12])  # 12: the second rank has nothing but padding
def test_two_ranks_give_the_whole(dtype: torch.dtype, vocab_size: int) -> None:
    first, second = run_distributed(on_a_rank, 2, dtype, 40, vocab_size)
    hidden, table, bias, targets = inputs(150, 40, dtype)
    exact = [item.double().requires_grad_() for item in (hidden, table, bias)]
    expected = linear_cross_entropy_reference(
        *exact[:2], targets % vocab_size, bias=exact[2], vocab_size=vocab_size, label_smoothing=0.1, z_loss=0.01
    )
    (expected * 0.5).backward()
    gradients = [item.grad for item in exact]
    assert first[0].item() == second[0].item()
    close(first[0], expected.detach(), min(TOLERANCE[dtype], 5e-3))
    parts = (
        first[1].double() + second[1].double(),
        torch.cat((first[2], second[2])),
        torch.cat((first[3], second[3])),
    )
    for part, gradient in zip(parts, gradients, strict=True):
        assert gradient is not None
        close(part, gradient, TOLERANCE[dtype])
