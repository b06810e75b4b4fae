"""LayerNorm with weighted statistics and RMSNorm against their definitions in fp64 autograd; and the sum and the
dropout in front of them against the same operations one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from elle_mp.ops.dropout import DropoutKey, dropout, threshold
from elle_mp.ops.norms import (
    has_kernel,
    layer_norm,
    residual_rms_norm,
    residual_rms_norm_reference,
    rms_norm,
    weighted_layer_norm,
    weighted_layer_norm_reference,
)

EPS = 1e-5
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1.5e-2}
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
def test_layer_norm(path: str, dtype: torch.dtype, shape: tuple[int, ...], weighted: bool) -> None:
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
def test_rms_norm(path: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
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


needs_kernels = pytest.mark.skipif(not has_kernel(torch.empty(0)), reason="the ops are not built")


@dataclass(frozen=True)
class Case:
    """Sizes and options of one norm of a sum."""

    batch: int
    length: int
    columns: int
    kind: str = "weighted"
    """``plain``, ``weighted`` or ``rms``."""
    p: float = 0.0
    first_row: int | tuple[int, ...] = 3
    strided: bool = False

    def tensors(self) -> list[Tensor]:
        """x, residual, weight, bias, gradients of y and h; exact in every type, far from zero."""
        torch.manual_seed(0)
        shape = (self.batch, self.length, self.columns)
        hidden = [torch.randn(shape) for _ in range(4)]
        hidden[1] += 5.0
        if self.strided:
            hidden = [torch.randn(self.length, self.batch, 2 * self.columns)[..., ::2].transpose(0, 1) for _ in hidden]
        found = [*hidden[:2], *torch.randn(2, self.columns), *hidden[2:]]
        return [x.copy_(x.bfloat16()) for x in found]

    def run(self, dtype: torch.dtype, reference: bool = False) -> list[Tensor]:
        """y, h and the gradients of x, residual, weight and, but for RMSNorm, bias."""
        *leaves, dy, dh = (x.to(dtype) for x in self.tensors())
        leaves = [x.detach().requires_grad_() for x in (leaves[:3] if self.kind == "rms" else leaves)]
        key = DropoutKey(7, torch.arange(self.batch) * 5 + 1)
        options: dict[str, Any] = {"p": self.p, "key": key, "first_row": self.first_row}
        if self.kind == "rms":
            y, h = (residual_rms_norm_reference if reference else residual_rms_norm)(*leaves, EPS, **options)
        else:
            norm = weighted_layer_norm_reference if reference else weighted_layer_norm
            y, h = norm(*leaves, EPS, self.weights(), **options)
        return [y.detach(), h.detach(), *torch.autograd.grad((y, h), leaves, (dy, dh))]

    def weights(self) -> Tensor | None:
        """Of the statistics."""
        weights = torch.arange(1.0, self.columns + 1.0, dtype=torch.float64)
        return weights / weights.sum() if self.kind == "weighted" else None


CASES = [
    Case(3, 70, 48, p=0.3),
    Case(2, 20, 33, "plain", p=0.1, first_row=(4, 30)),
    Case(1, 1, 7, p=0.5),
    Case(2, 3, 1, "rms", p=0.2),
    Case(0, 5, 12, p=0.2),
    Case(2, 0, 12, "rms"),
    Case(2, 65, 16, "rms", p=0.1, first_row=0),
    Case(1, 9, 770, "plain"),
    Case(2, 100, 129, p=0.1, strided=True),
    Case(5, 3, 66, "plain", p=0.9, strided=True),
]


def check(case: Case, dtype: torch.dtype) -> None:
    """Against the reference in fp64, which rounds nothing; largest difference over the largest entry."""
    values, expected = case.run(dtype), case.run(torch.float64, reference=True)
    for number, (value, exact) in enumerate(zip(values, expected, strict=True)):
        assert value.dtype == dtype and value.shape == exact.shape
        if exact.numel():
            far = (value.double() - exact).abs().max() / exact.abs().max().clamp(min=0.1)
            assert far < TOLERANCE[dtype], number


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_of_a_sum(level: str, dtype: torch.dtype, case: Case) -> None:
    check(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_a_sum_without_kernels(path: str, dtype: torch.dtype) -> None:
    for case in CASES:
        check(case, dtype)


@needs_kernels
@pytest.mark.parametrize("seed", range(8))
def test_random_shapes(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    batch, length, columns, choice = (int(torch.randint(1, n, (), generator=draw)) for n in (4, 150, 200, 4))
    kind = ("plain", "weighted", "rms")[choice - 1]
    check(Case(batch, length, columns, kind, 0.1 * (seed % 3)), (torch.float32, torch.bfloat16)[seed % 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [48, 77])
def test_one_op_is_the_three_bit_for_bit(level: str, dtype: torch.dtype, columns: int) -> None:
    """So a model computes the same whether its layout lets it fuse or not."""
    for kind in ("plain", "weighted", "rms"):
        case = Case(2, 90, columns, kind, p=0.2, first_row=(4, 300))
        x, residual, weight, bias, dy, dh = (t.to(dtype).requires_grad_() for t in case.tensors())
        h = residual + dropout(x, case.p, DropoutKey(7, torch.arange(2) * 5 + 1), case.first_row)
        y = rms_norm(h, weight, EPS) if kind == "rms" else layer_norm(h, weight, bias, EPS, case.weights())
        leaves = (x, residual, weight) if kind == "rms" else (x, residual, weight, bias)
        expected = (y, h, *torch.autograd.grad((y, h), leaves, (dy.detach(), dh.detach())))
        assert all(torch.equal(a, b) for a, b in zip(case.run(dtype), expected, strict=True))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_bitwise_repeatable_and_independent_of_threads(two_threads: None, dtype: torch.dtype) -> None:
    case = Case(3, 301, 80, p=0.1)
    first = case.run(dtype)
    for threads in (2, 1, 2):
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(first, case.run(dtype), strict=True))


def test_either_result_alone_has_a_gradient(path: str) -> None:
    case = Case(2, 5, 24, p=0.3)
    x, residual, weight, bias, dy, _ = case.tensors()
    x.requires_grad_()
    key = DropoutKey(1, torch.tensor([0, 1]))
    for number in range(2):
        out = weighted_layer_norm(x, residual, weight, bias, EPS, p=0.3, key=key)[number]
        exact = weighted_layer_norm_reference(*(t.double() for t in (x, residual, weight, bias)), EPS, p=0.3, key=key)
        (found,), (expected,) = (torch.autograd.grad(o, x, dy.to(o.dtype)) for o in (out, exact[number]))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert residual.grad is None and weight.grad is None


def test_parameters_of_another_type(path: str) -> None:
    """fp32 gains of bf16 hidden states have gradients in fp32, that lose nothing to bf16."""
    x, dy = torch.randn(2, 200, 16).bfloat16(), torch.ones(2, 200, 16).bfloat16()
    weight, bias = torch.ones(16, requires_grad=True), torch.zeros(16, requires_grad=True)
    out = layer_norm(x, weight, bias, EPS, torch.full((16,), 1 / 16, dtype=torch.float64))
    found = torch.autograd.grad(out, (weight, bias), dy)
    assert out.dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in found)
    assert bool((found[1] == 400).all())


@needs_kernels
def test_opcheck() -> None:
    ops = torch.ops.elle_mp
    torch.manual_seed(0)
    x, residual, dy, dh = (torch.randn(2, 3, 5) for _ in range(4))
    weight, bias = torch.randn(2, 5)
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
    stat_weights, keys, level = torch.full((5,), 0.2, dtype=torch.float64), torch.tensor([4, 9]), threshold(0.3)
    torch.library.opcheck(ops.add_norm.default, (*leaves, stat_weights, keys, 2, level, EPS, False))
    torch.library.opcheck(ops.add_norm.default, (x, None, weight, None, None, None, 0, 0, EPS, True))
    some = ("test_schema", "test_faketensor")
    with torch.no_grad():
        _, h, statistics = ops.add_norm(*leaves, stat_weights, keys, 2, level, EPS, False)
        saved = (dy, dh, h, weight, stat_weights, statistics, keys, 2, level, False)
        torch.library.opcheck(ops.add_norm_backward.default, saved, test_utils=some)


@needs_kernels
def test_compiled_by_torch_without_a_break() -> None:
    x, residual, weight, bias, dy, dh = Case(2, 6, 20).tensors()
    results = []
    for norm in (torch.compile(weighted_layer_norm, backend="aot_eager", fullgraph=True), weighted_layer_norm):
        leaves = [t.clone().requires_grad_() for t in (x, residual, weight, bias)]
        out = norm(*leaves, EPS)
        results.append((*out, *torch.autograd.grad(out, leaves, (dy, dh))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_does_not_fit_is_refused(path: str) -> None:
    x, weight = torch.randn(2, 3, 4), torch.ones(4)
    key = DropoutKey(1, torch.arange(2))
    with pytest.raises(ValueError, match="x and residual"):
        weighted_layer_norm(x, x[:, :2], weight, weight, EPS)
    with pytest.raises(ValueError, match="x and residual"):
        residual_rms_norm(x, x.bfloat16(), weight, EPS)
    with pytest.raises(ValueError, match="equally long runs"):
        residual_rms_norm(x, x, weight, EPS, p=0.1, key=key, first_row=(0, 9))
    with pytest.raises(ValueError, match="probability"):
        residual_rms_norm(x, x, weight, EPS, p=1.0, key=key)


def test_gradcheck_of_the_references() -> None:
    """fp64 has no kernel: the faces take the references."""
    x, residual, weight, bias, *_ = (t.double().requires_grad_() for t in Case(2, 3, 4).tensors())
    w = Case(2, 3, 4).weights()
    options: dict[str, Any] = {"p": 0.3, "key": DropoutKey(1, torch.arange(2))}
    assert torch.autograd.gradcheck(lambda *t: weighted_layer_norm(*t, EPS, w, **options), (x, residual, weight, bias))
    assert torch.autograd.gradcheck(lambda *t: residual_rms_norm(*t, EPS, **options), (x, residual, weight))
