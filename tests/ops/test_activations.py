"""GELU in bf16 against PyTorch's in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from elle_mp.ops.activations import gelu


@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_value_and_slope(path: str, tanh: bool, dtype: torch.dtype) -> None:
    x = torch.cat((torch.linspace(-12, 12, 4801), torch.tensor([0.0, -0.0, 1e30, -1e30]))).to(dtype).requires_grad_()
    upstream = torch.randn(x.shape).to(dtype)
    out = gelu(x, tanh=tanh)
    (gradient,) = torch.autograd.grad(out, x, upstream)
    exact = x.detach().double().requires_grad_()
    expected = F.gelu(exact, approximate="tanh" if tanh else "none")
    (expected_gradient,) = torch.autograd.grad(expected, exact, upstream.double())
    # One rounding of the result; the tails are tiny, so an absolute bound holds them.
    rtol, atol = (2.0**-8, 3e-6) if dtype == torch.bfloat16 else (1e-5, 3e-6)
    # PyTorch's own slope of the tanh form is 0 * inf at 1e30.
    inside = exact.detach().abs() < 1e3
    torch.testing.assert_close(out.detach().double(), expected.detach(), rtol=rtol, atol=atol)
    torch.testing.assert_close(gradient.double()[inside], expected_gradient[inside], rtol=rtol, atol=atol)


@pytest.mark.parametrize("shape", [(0, 4), (1,), (3, 15), (2, 3, 32)])
def test_shapes_strides_and_no_grad(path: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(*shape, 2).bfloat16()[..., 0].requires_grad_()
    out = gelu(x)
    out.float().sum().backward()
    expected = F.gelu(x.detach().double())
    assert out.shape == x.shape
    torch.testing.assert_close(out.detach().double(), expected, rtol=2.0**-8, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(gelu(x), out)


def test_gradcheck() -> None:
    x = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gelu(x, tanh=True), x)
