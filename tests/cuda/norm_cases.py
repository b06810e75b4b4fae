"""Calls of the fused norms that the CUDA kernels are tested with, on the emulator and on GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elle_mp.ops.dropout import DropoutKey, keep_mask, keep_scale, sample_keys, threshold

TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
EPS = 1e-5


@dataclass(frozen=True)
class NormCase:
    """Sizes and options of one call."""

    shape: tuple[int, int, int]
    dtype: torch.dtype = torch.float32
    rms: bool = False
    weighted: bool = False
    residual: bool = False
    dropout: float = 0.0
    upstream: bool = False
    """Whether ``h`` has a gradient of its own."""


CASES = [
    NormCase((1, 1, 1), weighted=True),
    NormCase((2, 3, 70), weighted=True, residual=True, dropout=0.3, upstream=True),
    NormCase((2, 5, 64), rms=True, residual=True, upstream=True),
    NormCase((1, 9, 1040), dtype=torch.bfloat16, weighted=True, residual=True, dropout=0.1),
    NormCase((2, 5, 2056), dtype=torch.float16, dropout=0.2, upstream=True),
    NormCase((3, 2, 33), dtype=torch.bfloat16, rms=True),
    NormCase((2, 700, 3), dtype=torch.float32, residual=True),
    NormCase((0, 4, 8)),
]


def name_of(case: NormCase) -> str:
    """For the test's name."""
    options = [key for key, value in vars(case).items() if value is True or (key == "dropout" and value)]
    return "-".join([str(case.dtype).removeprefix("torch."), *map(str, case.shape), *options])


def run_and_check(ops: Any, case: NormCase, device: str = "cpu") -> tuple[Tensor, ...]:
    """Runs both directions and compares all results with fp64; returns them."""
    torch.manual_seed(5)
    columns, double = case.shape[2], torch.float64

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=double).to(case.dtype)

    x, residual, dy, dh = draw(*case.shape), draw(*case.shape), draw(*case.shape), draw(*case.shape)
    weight, bias = torch.randn(columns), None if case.rms else torch.randn(columns)
    share = torch.rand(columns, dtype=double).add(0.01)
    share = share / share.sum() if case.weighted else torch.full((columns,), 1 / columns, dtype=double)
    level, keys = threshold(case.dropout), sample_keys(DropoutKey(3, torch.arange(case.shape[0])))
    keep = keep_mask(keys, 4, case.shape[1], columns, case.dropout)
    scale = keep_scale(case.dropout)

    # What is stored on the way is rounded.
    h = torch.where(keep, x.float() * scale, 0.0).to(case.dtype) if level else x
    h = (residual.float() + h.float()).to(case.dtype) if case.residual else h
    leaf = h.double().requires_grad_()
    wide = [p.double().requires_grad_() for p in (weight, torch.zeros(columns) if bias is None else bias)]
    centred = leaf if case.rms else leaf - (leaf * share).sum(-1, keepdim=True)
    normal = centred * ((centred.square() * share).sum(-1, keepdim=True) + EPS).rsqrt()
    y = normal * wide[0] + wide[1]
    d_h, d_weight, d_bias = torch.autograd.grad(y, (leaf, *wide), dy.double())
    d_h = d_h + dh.double() if case.upstream else d_h
    d_x = torch.where(keep, d_h * scale, 0.0)

    def there(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(device)

    given = keys.to(device) if level else None
    stat = share.to(device) if case.weighted else None
    added = there(residual) if case.residual else None
    found_y, found_h, statistics = ops.add_norm(
        there(x), added, there(weight), there(bias), stat, given, 4, level, EPS, case.rms
    )
    adds = case.residual or level > 0
    kept = found_h if adds else there(x)
    back = ops.add_norm_backward(
        *(there(dy), there(dh) if case.upstream else None, kept, there(weight), stat, statistics, given),
        *(4, level, case.rms),
    )
    found_residual, found_x, sums = (value.cpu() for value in back)
    assert not adds or torch.equal(found_h.cpu(), h)
    tolerance = TOLERANCE[case.dtype]
    _close(found_y.cpu(), y.detach(), tolerance)
    _close(found_residual, d_h, tolerance)
    if level:
        _close(found_x, d_x, tolerance)
    _close(sums[0], d_weight, 1e-5)
    _close(sums[1], torch.zeros_like(d_bias) if dy.numel() == 0 else dy.double().sum((0, 1)), 1e-5)
    return tuple(value.cpu() for value in (found_y, found_h, statistics, *back))


def _close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert found.shape == wanted.shape
    if wanted.numel():
        difference = float((found.double() - wanted).abs().max() / wanted.abs().max().clamp(min=0.1))
        assert difference < tolerance, f"differs by {difference:.1e}"
