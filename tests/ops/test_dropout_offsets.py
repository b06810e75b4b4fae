"""Dropout of a part of a sequence has the mask that the part has in the whole."""

from __future__ import annotations

import pytest
import torch

from elle_mp.ops.dropout import DropoutKey, dropout


def key_of(batch: int) -> DropoutKey:
    return DropoutKey(5, torch.arange(batch) * 1000 + 17)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("starts", [(0,), (7,), (0, 18), (6, 12), (3, 10, 17)])
def test_runs_have_the_masks_of_the_whole(path: str, dtype: torch.dtype, starts: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, key = torch.randn(3, 24, 37).to(dtype), key_of(3)
    whole = dropout(x, 0.3, key)
    some = torch.cat([x[:, start : start + 6] for start in starts], 1).requires_grad_()
    out = dropout(some, 0.3, key, first_row=starts)
    expected = torch.cat([whole[:, start : start + 6] for start in starts], 1)
    assert torch.equal(out.detach(), expected)
    (gradient,) = torch.autograd.grad(out, some, torch.ones_like(out))
    assert torch.equal(gradient != 0, torch.cat([(whole != 0)[:, start : start + 6] for start in starts], 1))


def test_positions_far_out_and_strides(path: str) -> None:
    """Row numbers are taken modulo 2^64 like everything else in the hash."""
    x, key = torch.ones(2, 8, 5), key_of(2)
    far = 1 << 40
    parts = [dropout(x[:, :4], 0.5, key, first_row=far), dropout(x[:, 4:], 0.5, key, first_row=3)]
    strided = torch.ones(2, 5, 16)[:, :, ::2].transpose(1, 2)
    assert torch.equal(dropout(strided, 0.5, key, first_row=(far, 3)), torch.cat(parts, 1))


def test_what_does_not_divide() -> None:
    with pytest.raises(ValueError, match="equally long"):
        dropout(torch.ones(2, 7, 3), 0.1, key_of(2), first_row=(0, 9))
