"""The CUDA kernels that work on rows, on the emulator, against their PyTorch twins."""

from __future__ import annotations

from typing import Any

import pytest
import torch

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
