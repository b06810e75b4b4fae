"""The compiled attention at every instruction level against the explicit softmax in fp64."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from elle_mp.ops import library
from elle_mp.ops.dropout import DropoutKey, keep_mask, sample_keys, threshold
from elle_mp.ops.expanded_attention import (
    expanded_attention,
    expanded_attention_reference,
    has_kernel,
    packed_attention_kernel,
)

# Largest difference over the largest entry. bf16 rounds weights, their gradients and results (2^-9 each).
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1.5e-2}

needs_kernels = pytest.mark.skipif(not has_kernel(torch.empty(0)), reason="the ops are not built")


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call."""

    batch: int
    text: int
    heads: int
    groups: int
    dim: int
    prompt: int = 0
    causal: bool = True
    kv_map: tuple[int, ...] | None = None
    documents: float = 0.0
    """Probability that a document starts at a position; 0: no documents."""
    padded: bool = False
    dropout: float = 0.0
    some: bool = False
    """Only some positions have a query."""
    strided: bool = False
    scale: float | None = None

    def options(self) -> dict[str, Any]:
        """The keyword arguments."""
        length = self.prompt + self.text
        found: dict[str, Any] = {"causal": self.causal, "kv_map": self.kv_map, "scale": self.scale, "first_head": 2}
        found |= {"dropout": self.dropout, "key": DropoutKey(3, torch.arange(self.batch) * 7 + 1)}
        if self.documents:
            starts = torch.rand(self.batch, length) < self.documents
            starts[:, : self.prompt] = False
            starts[:, self.prompt : self.prompt + 1] = True
            place = torch.where(starts, torch.arange(length), 0)
            found |= {"doc_starts": place.cummax(1).values, "prompt_length": self.prompt}
        if self.padded:
            found["key_lengths"] = torch.randint(length // 3, length + 1, (self.batch,))
        if self.some:
            found["positions"] = torch.arange(length)[torch.rand(length) < 0.5]
        return found

    def tensors(self, dtype: torch.dtype, options: dict[str, Any]) -> list[Tensor]:
        """q, k, v; upstream gradients of the output and of the log-sum-exp. Exact in every type."""
        queries = len(options["positions"]) if self.some else self.text
        length = self.prompt + self.text
        shapes = [(self.batch, queries, self.heads), *[(self.batch, length, self.groups)] * 2]
        found = [torch.randn(*shape, self.dim).bfloat16().to(dtype) for shape in [*shapes, shapes[0]]]
        if self.strided:
            # Heads before positions in memory, other heads between, and every second entry of a row.
            for i, x in enumerate(found):
                wide = torch.randn(*x.shape[:1], 2 * x.shape[2], x.shape[1], 2 * x.shape[3]).to(dtype)
                view = wide[:, ::2, :, :: 2 if i == 1 else 1][..., : self.dim].transpose(1, 2)
                found[i] = view.copy_(x)
        return [*found, torch.randn(self.batch, self.heads, queries)]


CASES = [
    Case(2, 33, 2, 2, 8),
    Case(0, 5, 2, 1, 8),
    Case(1, 1, 1, 1, 4),
    Case(1, 300, 4, 2, 64),
    Case(2, 130, 3, 1, 40, causal=False),
    Case(1, 70, 5, 3, 16, kv_map=(0, 0, 1, 2, 2), dropout=0.2),
    Case(1, 200, 4, 3, 32, kv_map=(2, 0, 2, 0)),
    Case(1, 200, 2, 1, 16, prompt=64, documents=0.03),
    Case(2, 90, 2, 2, 20, prompt=5, documents=0.5, dropout=0.3),
    Case(1, 90, 1, 1, 16, documents=1.0),
    Case(2, 150, 2, 1, 48, prompt=17, documents=0.05, causal=False),
    Case(3, 100, 2, 2, 16, padded=True, causal=False, dropout=0.1),
    Case(2, 100, 2, 2, 7, prompt=3, padded=True, documents=0.1),
    Case(2, 160, 2, 2, 24, some=True, dropout=0.1),
    Case(2, 75, 3, 3, 33, strided=True),
    Case(1, 129, 2, 1, 96, strided=True, causal=False, scale=0.3),
    Case(1, 20, 2, 2, 128, prompt=300),
]


def difference(value: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest entry; infinities must be the same ones."""
    finite = expected.isfinite()
    assert torch.equal(value.isfinite(), finite)
    if not bool(finite.any()):
        return 0.0
    far = (value.double() - expected)[finite].abs().max()
    return float(far / expected[finite].abs().max().clamp(min=1e-2))


def run(attend: Any, dtype: torch.dtype, tensors: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    """Output, log-sum-exp and the gradients of q, k, v."""
    *inputs, grad, grad_lse = tensors
    leaves = [x.to(dtype) if x.dtype != dtype else x.detach() for x in inputs]
    for leaf in leaves:
        leaf.requires_grad_()
    out, lse = attend(*leaves, **options)
    grad_lse = torch.where(lse.isfinite(), grad_lse, 0.0).to(lse.dtype)
    gradients = torch.autograd.grad((out, lse), leaves, (grad.to(dtype), grad_lse))
    return [out.detach(), lse.detach(), *gradients]


def check(case: Case, dtype: torch.dtype) -> None:
    """Both directions against the reference in fp64."""
    torch.manual_seed(0)
    options = case.options()
    tensors = case.tensors(dtype, options)
    found = run(expanded_attention, dtype, tensors, options)
    expected = run(expanded_attention_reference, torch.float64, tensors, options)
    for name, value, exact in zip(("out", "lse", "dq", "dk", "dv"), found, expected, strict=True):
        assert value.shape == exact.shape and value.dtype == (torch.float32 if name == "lse" else dtype)
        assert difference(value, exact) < (1e-5 if name == "lse" else TOLERANCE[dtype]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_equal_the_reference(level: str, dtype: torch.dtype, case: Case) -> None:
    check(case, dtype)


@needs_kernels
@pytest.mark.parametrize("seed", range(12))
def test_random_shapes(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    heads, groups = draw(1, 6), draw(1, 3)
    check(
        Case(
            batch=draw(1, 3),
            text=draw(1, 230),
            heads=heads,
            groups=groups,
            dim=draw(1, 80),
            prompt=draw(0, 1) * draw(1, 70),
            causal=bool(draw(0, 1)),
            kv_map=tuple(draw(0, groups - 1) for _ in range(heads)),
            documents=draw(0, 1) * 0.02 * draw(1, 10),
            padded=bool(draw(0, 1)),
            dropout=0.1 * draw(0, 2),
            some=bool(draw(0, 1)),
            strided=bool(draw(0, 1)),
        ),
        (torch.float32, torch.bfloat16)[seed % 2],
    )


@pytest.mark.parametrize("causal", [False, True])
def test_the_definition_token_by_token(causal: bool) -> None:
    """Two documents behind a prompt of two: the reference's weights against a list written by hand."""
    starts = torch.tensor([[0, 0, 2, 2, 4, 4]])
    sees = ["pp....", "pp....", "pp22..", "pp22..", "pp..44", "pp..44"]
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 6, 1, 6, dtype=torch.float64)
    v = torch.eye(6, dtype=torch.float64)[None, :, None]
    weights, _ = expanded_attention_reference(q, k, v, causal=causal, doc_starts=starts, prompt_length=2)
    for i, row in enumerate(sees):
        expected = [c != "." and (j <= i or not causal) for j, c in enumerate(row)]
        assert (weights[0, i, 0] != 0).tolist() == expected
    assert torch.allclose(weights.sum(-1), torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_masks_are_those_of_the_generator(level: str, dtype: torch.dtype, causal: bool) -> None:
    """Values that are rows of the identity make the output the weights: where they are zero, they were dropped."""
    torch.manual_seed(0)
    q, k = (torch.randn(2, 90, 2, 90).to(dtype) * 0.1 for _ in range(2))
    v = torch.eye(90, dtype=dtype)[None, :, None].expand(2, -1, 2, -1)
    key = DropoutKey(5, torch.tensor([4, 9]))
    out, _ = expanded_attention(q, k, v, causal=causal, dropout=0.4, key=key, first_head=3)
    keep = keep_mask(sample_keys(key), 3 * 90, 2 * 90, 90, 0.4).view(2, 2, 90, 90).transpose(1, 2)
    seen = torch.ones(90, 90, dtype=torch.bool).tril() if causal else torch.ones(90, 90, dtype=torch.bool)
    assert torch.equal(out != 0, keep & seen[:, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_a_fused_projection_is_its_slices(level: str, dtype: torch.dtype, causal: bool) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(2, 100, 3, 4, 24).to(dtype).requires_grad_()
    key = DropoutKey(5, torch.tensor([4, 9]))
    slices = qkv[:, :, :, :2].flatten(2, 3), qkv[:, :, :, 2], qkv[:, :, :, 3]
    expected, _ = expanded_attention(*slices, causal=causal, dropout=0.1, key=key, first_head=1)
    out = packed_attention_kernel(qkv, causal, 0.1, sample_keys(key), 1)
    upstream = torch.randn_like(out)
    assert torch.equal(out, expected)
    assert torch.equal(*(torch.autograd.grad(x, qkv, upstream)[0] for x in (out, expected)))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_bitwise_repeatable_and_independent_of_threads(two_threads: None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    case = Case(2, 300, 6, 3, 32, prompt=16, documents=0.02, dropout=0.1)
    options = case.options()
    tensors = case.tensors(dtype, options)
    first = run(expanded_attention, dtype, tensors, options)
    for threads in (2, 2, 1, 2):
        torch.set_num_threads(threads)
        again = run(expanded_attention, dtype, tensors, options)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@needs_kernels
def test_opcheck() -> None:
    """Schema, fake tensors, autograd and tracing; of the backward ops, which nothing traces alone, the first two."""
    torch.manual_seed(0)
    ops = torch.ops.elle_mp
    q, k, v = (torch.randn(1, 3, heads, 2).requires_grad_() for heads in (2, 1, 1))
    seen = torch.tensor([[[0, 0, 1], [0, 0, 2], [0, 0, 3]]], dtype=torch.int32)
    masks = seen, torch.tensor([5]), torch.arange(3), 1, threshold(0.1), 0.3
    kv_map = torch.tensor([0, 0])
    torch.library.opcheck(ops.expanded_attention.default, (q, k, v, kv_map, *masks))
    qkv = torch.randn(1, 3, 1, 4, 2).bfloat16().requires_grad_()
    torch.library.opcheck(ops.packed_attention.default, (qkv, *masks))
    some = ("test_schema", "test_faketensor")
    with torch.no_grad():
        out, lse = ops.expanded_attention(q, k, v, kv_map, *masks)
        grads = torch.randn_like(out), torch.randn_like(lse)
        saved = (*grads, q, k, v, out, lse, kv_map, *masks)
        torch.library.opcheck(ops.expanded_attention_backward.default, saved, test_utils=some)
        out, lse = ops.packed_attention(qkv, *masks)
        saved = (torch.randn_like(out), None, qkv, out, lse, *masks)
        torch.library.opcheck(ops.packed_attention_backward.default, saved, test_utils=some)


@needs_kernels
def test_compiled_by_torch_without_a_break() -> None:
    torch.manual_seed(0)
    case = Case(1, 40, 2, 1, 8, prompt=4, documents=0.1)
    options = case.options()
    tensors = case.tensors(torch.float32, options)
    compiled = torch.compile(expanded_attention, backend="aot_eager", fullgraph=True)
    found, expected = (run(attend, torch.float32, tensors, options) for attend in (compiled, expanded_attention))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_that_sees_nothing(level: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 70, 2, 16).to(dtype).requires_grad_() for _ in range(3))
    out, lse = expanded_attention(q, k, v, causal=False, key_lengths=torch.tensor([0, 9]))
    assert not bool(out[0].any()) and bool((lse[0] == float("-inf")).all()) and bool(lse[1].isfinite().all())
    gradients = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    assert all(bool(x.isfinite().all()) and not bool(x[0].any()) for x in gradients)
    assert not bool(gradients[1][1, 9:].any()) and bool(gradients[1][1, :9].any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores_stay_finite_and_nan_visible(level: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q = torch.full((1, 80, 2, 16), 60.0, dtype=dtype).requires_grad_()
    k, v = (torch.randn(1, 80, 2, 16).to(dtype) * 60 for _ in range(2))
    out, _ = expanded_attention(q, k, v, causal=True, dropout=0.1, key=DropoutKey(1, torch.tensor([2])))
    (gradient,) = torch.autograd.grad(out.float().sum(), q)
    assert bool(out.isfinite().all()) and bool(gradient.isfinite().all())
    with torch.no_grad():
        q[0, 37, 1, 3] = float("nan")
        out, lse = expanded_attention(q, k, v, causal=True)
    broken = torch.zeros(80, 2, dtype=torch.bool)
    broken[37, 1] = True
    assert torch.equal(out[0].isnan().all(-1), broken) and torch.equal(out[0].isnan().any(-1), broken)
    assert torch.equal(lse[0].isnan().T, broken)


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck_of_the_reference(causal: bool) -> None:
    """fp64 has no kernel: the face takes the reference."""
    torch.manual_seed(0)
    case = Case(2, 3, 2, 2, 2, prompt=2, causal=causal, kv_map=(1, 0), documents=0.4, padded=True, dropout=0.2)
    options = case.options()
    inputs = [x.requires_grad_() for x in case.tensors(torch.float64, options)[:3]]

    def finite(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = expanded_attention(*leaves, **options)
        return out, lse[lse.isfinite()]

    assert torch.autograd.gradcheck(finite, inputs)


def test_what_does_not_fit() -> None:
    q, k = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 3, 8)
    with pytest.raises(ValueError, match="want a kv_map"):
        expanded_attention(q, k, k, causal=True)
    with pytest.raises(ValueError, match="do not fit"):
        expanded_attention(q, k, k[:, :4], causal=True)
    with pytest.raises(ValueError, match="is not 4 of 3 heads"):
        expanded_attention(q, k, k, causal=True, kv_map=(0, 1, 2, 3))
    with pytest.raises(ValueError, match="only 4 keys"):
        expanded_attention(q, q[:, :4], q[:, :4], causal=True)
    with pytest.raises(ValueError, match="wants a key"):
        expanded_attention(q, q, q, causal=True, dropout=0.1)
    with pytest.raises(ValueError, match="not positive"):
        expanded_attention(q, q, q, causal=True, scale=0.0)
    with pytest.raises(ValueError, match="doc_starts"):
        expanded_attention(q, q, q, causal=True, doc_starts=torch.zeros(2, 4, dtype=torch.int64))


@needs_kernels
def test_an_instruction_level_that_there_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELLE_MP_INSTRUCTIONS", "sse9")
    with pytest.raises(RuntimeError, match="sse9 is none of plain, avx2"):
        library.instructions()


@needs_kernels
def test_the_library_serves_every_python() -> None:
    content = library.LIBRARY.read_bytes()
    # Names of functions of Python's C interface, as PyObject_Call.
    assert not re.search(rb"\0_?Py[A-Za-z]*_[A-Za-z]", content) and b"libpython" not in content


@needs_kernels
def test_torch_counts_its_operations() -> None:
    q, k, v = (torch.randn(2, 9, heads, 8, requires_grad=True) for heads in (6, 3, 3))
    with FlopCounterMode(display=False) as counter:
        expanded_attention(q, k, v, causal=True)[0].sum().backward()
        packed_attention_kernel(
            torch.randn(2, 9, 3, 4, 8, requires_grad=True), True, 0.0, torch.zeros(2, dtype=torch.int64), 0
        ).sum().backward()
    assert counter.get_total_flops() == 2 * (4 + 10) * 2 * 6 * 9 * 9 * 8
