"""The fused projection and cross entropy against F.cross_entropy, in one process and in two."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from elle_mp.ops import linear_cross_entropy as module
from elle_mp.ops.linear_cross_entropy import linear_cross_entropy
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
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1)  # so that there are several chunks
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
        monkeypatch.setattr(module, "_CHUNK_BYTES", size)
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
    expected = reference(*exact, targets % vocab_size, vocab_size)
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
