"""The CUDA kernels that work on rows, on the emulator, against their PyTorch twins."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from elle_mp.ops import linear_cross_entropy
from elle_mp.ops.dropout import DropoutKey, keep_mask, keep_scale, sample_keys, threshold

TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(2, 3, 70), (1, 1, 1), (2, 2, 1029), (0, 3, 4), (2, 3, 0)])
def test_dropout_is_bit_for_bit_the_reference(
    emulated: Any, order: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    keys = sample_keys(DropoutKey(3, torch.arange(shape[0])))
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    out = emulated.dropout_rows(x, keys, 5, threshold(0.3))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    keep = keep_mask(keys, 5, shape[1], shape[2], 0.3)
    assert torch.equal(out, torch.where(keep, x.to(wide) * keep_scale(0.3), 0.0).to(dtype))


def test_dropout_takes_any_strides(emulated: Any) -> None:
    x = torch.randn(4, 6, 3).transpose(1, 2)
    keys = sample_keys(DropoutKey(1, torch.arange(4)))
    assert torch.equal(emulated.dropout_rows(x, keys, 0, 9000), emulated.dropout_rows(x.contiguous(), keys, 0, 9000))
    with pytest.raises(RuntimeError, match="keys does not fit"):
        emulated.dropout_rows(x, keys[:2], 0, 9000)


def test_opcheck_of_the_librarys_own_ops(emulated: Any) -> None:
    x, keys = torch.randn(2, 3, 8), sample_keys(DropoutKey(1, torch.arange(2)))
    torch.library.opcheck(emulated.dropout_rows, (x, keys, 0, 9000))
    out, rows, cols = torch.empty(2, 3), torch.tensor([0, 1]), torch.tensor([0, 0, 2], dtype=torch.int32)
    nothing = (None, None, None, None, None, 0, False, None, None, None, 0, 0.0, 0, 0, 0)
    torch.library.opcheck(emulated.expand_block, (torch.randn(2, 4), rows, cols, None, None, out, *nothing))


LOGITS = [(3, 1030), (2, 8), (1, 1), (0, 5), (2, 0), (2, 4099)]


@pytest.fixture
def torch_logits(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The PyTorch twins of the kernels for rows of logits."""
    monkeypatch.setattr(linear_cross_entropy, "_KERNELS", None)
    return linear_cross_entropy


@pytest.mark.parametrize("dtype", TYPES[:3])
@pytest.mark.parametrize("shape", LOGITS)
@pytest.mark.parametrize("offset", [0, 1])
def test_rows_of_logits_equal_the_reference(
    emulated: Any, torch_logits: Any, order: str, shape: tuple[int, int], offset: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    rows, columns = shape
    logits = (4 * torch.randn(rows, columns + 3)).to(dtype)[:, offset : offset + columns]
    targets = torch.randint(-1, max(columns, 1) + 1, (rows,))
    if rows > 1 and columns > 100:
        logits[1, :90] = float("-inf")
    wide = logits.double()
    found = emulated.logit_statistics(logits, targets)
    wanted = torch.stack(torch_logits.logit_statistics(wide, targets))
    torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=1e-3)
    lse = (wanted[0] + wanted[1].log()).float()
    factors = torch.rand(rows).round(decimals=1)
    factors[:1] = 0.0
    emulated.logit_gradient(logits, targets, lse, factors, 0.9, 0.1 / max(columns, 1))
    torch_logits.logit_gradient(wide, targets, lse.double(), factors.double(), 0.9, 0.1 / max(columns, 1))
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]
    torch.testing.assert_close(logits.double(), wide, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("count, rows, columns", [(50, 9, 24), (7, 300, 5), (0, 3, 8), (4, 0, 8), (30, 2, 1032)])
def test_the_gradient_of_a_table_equals_the_reference(
    emulated: Any, order: str, count: int, rows: int, columns: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(6)
    ids, grad = torch.randint(-2, rows + 2, (count,)), torch.randn(count, columns, dtype=torch.float64).to(dtype)
    ascending, place = ids.sort(stable=True)
    found = emulated.embedding_gradient(grad, ascending, place, rows)
    wanted = torch.zeros(rows, columns, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for i, row in enumerate(ids.tolist()):
        if 0 <= row < rows:
            wanted[row] += grad[i].to(wanted.dtype)
    assert torch.equal(found, wanted.to(dtype))
