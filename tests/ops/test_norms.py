"""LayerNorm with weighted statistics and RMSNorm against their definitions in fp64 autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from elle_mp.ops.norms import layer_norm, rms_norm

EPS = 1e-5
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
SHAPES = [(3, 5, 12), (4, 2), (0, 12), (1, 33), (7,)]


def weighted_reference(x: Tensor, weight: Tensor, bias: Tensor, w: Tensor) -> Tensor:
    mean = (x * w).sum(-1, keepdim=True)
    variance = ((x - mean) ** 2 * w).sum(-1, keepdim=True)
    return (x - mean) / (variance + EPS).sqrt() * weight + bias


def rms_reference(x: Tensor, weight: Tensor) -> Tensor:
    return x / ((x * x).mean(-1, keepdim=True) + EPS).sqrt() * weight


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    size = shape[-1]
    x, upstream = (torch.randn(*shape).add(0.5).bfloat16().to(dtype) for _ in range(2))
    weight, bias = (torch.randn(size).bfloat16().to(dtype) for _ in range(2))
    w = torch.rand(size, dtype=torch.float64) + 0.1
    return x, weight, bias, w / w.sum(), upstream


def compare(values: tuple[Tensor, ...], expected: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    for value, exact in zip(values, expected, strict=True):
        assert value.dtype == dtype and value.shape == exact.shape
        scale = exact.abs().max().item() if exact.numel() else 1.0
        torch.testing.assert_close(value.double(), exact, rtol=0, atol=TOLERANCE[dtype] * max(scale, 1.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_layer_norm(dtype: torch.dtype, shape: tuple[int, ...], weighted: bool) -> None:
    x, weight, bias, w, upstream = inputs(shape, dtype)
    if not weighted:
        w = torch.full_like(w, 1.0 / shape[-1])
    leaves = tuple(item.clone().requires_grad_() for item in (x, weight, bias))
    out = layer_norm(*leaves, EPS, w if weighted else None)
    gradients = torch.autograd.grad(out, leaves, upstream)
    exact = tuple(item.double().requires_grad_() for item in (x, weight, bias))
    expected = weighted_reference(*exact, w)
    compare(
        (out.detach(), *gradients),
        (expected.detach(), *torch.autograd.grad(expected, exact, upstream.double())),
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight, _, _, upstream = inputs(shape, dtype)
    leaves = tuple(item.clone().requires_grad_() for item in (x, weight))
    out = rms_norm(*leaves, EPS)
    gradients = torch.autograd.grad(out, leaves, upstream)
    exact = tuple(item.double().requires_grad_() for item in (x, weight))
    expected = rms_reference(*exact)
    compare(
        (out.detach(), *gradients),
        (expected.detach(), *torch.autograd.grad(expected, exact, upstream.double())),
        dtype,
    )


def test_copies_weighted_by_their_counts_change_nothing() -> None:
    """growth.md 1.1: units 0..4 copied unevenly; the statistics of the copies are those of the units."""
    torch.manual_seed(0)
    x = torch.randn(6, 5, dtype=torch.float64)
    weight, bias = torch.randn(2, 5, dtype=torch.float64)
    source = torch.tensor([0, 0, 0, 1, 2, 2, 3, 4])
    w = 1.0 / (torch.bincount(source)[source].double() * 5.0)
    grown = layer_norm(x[:, source], weight[source], bias[source], EPS, w)
    torch.testing.assert_close(grown, F.layer_norm(x, (5,), weight, bias, EPS)[:, source], rtol=1e-13, atol=1e-13)


def test_gradcheck() -> None:
    x, weight, bias, w, _ = inputs((3, 7), torch.float64)
    leaves = tuple(item.requires_grad_() for item in (x, weight, bias))
    assert torch.autograd.gradcheck(lambda *leaves: layer_norm(*leaves, EPS, w), leaves)
    assert torch.autograd.gradcheck(lambda *leaves: layer_norm(*leaves, EPS), leaves)
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, EPS), leaves[:2])


def test_frozen_gains_strides_and_no_grad() -> None:
    x, weight, bias, w, _ = inputs((8, 6, 7), torch.float64)
    strided = x.transpose(0, 1).requires_grad_()
    for norm in (lambda x: layer_norm(x, weight, bias, EPS, w), lambda x: rms_norm(x, weight, EPS)):
        out = norm(strided)
        out.sum().backward()
        torch.testing.assert_close(out, norm(x.transpose(0, 1).contiguous()), rtol=1e-13, atol=1e-13)
        with torch.no_grad():
            assert not norm(strided).requires_grad
    gain = weight.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(layer_norm(x, gain, bias, EPS, w).sum(), gain)
    assert gradient.shape == weight.shape
