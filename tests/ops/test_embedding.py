"""Lookup in a table that may be cut over the vocabulary, against torch's embedding on the whole table."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from elle_mp.ops.embedding import lookup


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("shape", [(4, 7), (13,), (0, 5), (2, 2, 3)])
def test_the_parts_sum_to_the_whole(parts: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    table = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, 12, shape)
    rows = 12 // parts
    out = sum(
        (lookup(table[part * rows : (part + 1) * rows], ids, part * rows) for part in range(parts)),
        torch.zeros((*shape, 5), dtype=torch.float64),
    )
    upstream = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, table, upstream)
    expected = F.embedding(ids, table)
    (expected_gradient,) = torch.autograd.grad(expected, table, upstream)
    assert torch.equal(out, expected)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-14, atol=1e-14)


def test_ids_of_other_ranks_give_zeros_and_no_gradient() -> None:
    table = torch.randn(4, 3, requires_grad=True)
    out = lookup(table, torch.tensor([3, 4, 7, 8, 200]), start=4)
    assert torch.equal(out[[0, 3, 4]], torch.zeros(3, 3))
    assert torch.equal(out[1:3], table.detach()[[0, 3]])
    out.sum().backward()
    assert table.grad is not None and table.grad.sum(1).tolist() == [3.0, 0.0, 0.0, 3.0]


def test_a_frequent_token_loses_nothing_in_bf16() -> None:
    table = torch.zeros(3, 2, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.ones(4096, dtype=torch.int64)
    lookup(table, ids).backward(torch.ones(4096, 2, dtype=torch.bfloat16))
    assert table.grad is not None and table.grad.dtype == torch.bfloat16
    assert table.grad[1].tolist() == [4096.0, 4096.0]  # summed in bf16 it stops at 256


def test_an_upstream_gradient_with_any_strides() -> None:
    table = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, 5], [2, 2], [1, 0]])
    upstream = torch.randn(4, 2, 3, dtype=torch.float64).permute(2, 1, 0)
    (ours,) = torch.autograd.grad(lookup(table, ids), table, upstream)
    (expected,) = torch.autograd.grad(F.embedding(ids, table), table, upstream)
    torch.testing.assert_close(ours, expected)
