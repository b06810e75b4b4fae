"""The CUDA kernels of attention, on the emulator, against the explicit softmax in fp64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from elle_mp.ops.dropout import DropoutKey, sample_keys, threshold
from elle_mp.ops.expanded_attention import _Shape, expanded_attention_reference, seen_keys

# Largest difference over the largest entry: weights, gradients of scores and results are rounded to 2^-9 and 2^-12.
TOLERANCE = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


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
    documents: bool = False
    padding: bool = False
    dropout: float = 0.0
    kv_map: tuple[int, ...] | None = None
    queries: int | None = None
    dtype: torch.dtype = torch.bfloat16


CASES = [
    Case(1, 1, 1, 1, 64),
    Case(2, 70, 2, 1, 64),
    Case(1, 130, 1, 1, 128, dropout=0.1),
    Case(1, 131, 1, 1, 64, causal=False, dropout=0.25),
    Case(2, 150, 2, 2, 64, prompt=3, documents=True, padding=True),
    Case(1, 200, 1, 1, 32, prompt=64, documents=True, causal=False, dropout=0.1),
    Case(1, 67, 5, 2, 24, kv_map=(0, 0, 1, 0, 1), dropout=0.5, padding=True),
    Case(2, 65, 1, 1, 7),
    Case(1, 40, 2, 1, 100, causal=False, padding=True, dtype=torch.float16),
    Case(1, 140, 2, 2, 64, queries=30, dropout=0.1, dtype=torch.float16),
    Case(1, 90, 3, 3, 80, prompt=1, documents=True, dropout=0.1, dtype=torch.float16),
]


def name_of(case: Case) -> str:
    plain = Case(case.batch, case.text, case.heads, case.groups, case.dim)
    options = [f"{k}" for k, v in vars(case).items() if v != getattr(plain, k)]
    return "-".join([f"B{case.batch}S{case.text}H{case.heads}G{case.groups}D{case.dim}", *options])


@dataclass
class Call:
    """Tensors of a case, in fp64 with the values of its type, and the options of the reference."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    grad_lse: Tensor
    options: dict[str, Any]
    seen: Tensor
    positions: Tensor
    keys: Tensor
    kv_map: Tensor


def make(case: Case) -> Call:
    torch.manual_seed(7)
    length = case.prompt + case.text
    queries = length if case.queries is None else case.queries

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(case.dtype).double()

    q = draw(case.batch, queries, case.heads, case.dim)
    k, v = (draw(case.batch, length, case.groups, case.dim) for _ in range(2))
    starts = None
    if case.documents:
        cuts = torch.rand(case.batch, length) < 0.05
        cuts[:, case.prompt] = True
        cuts[:, 0] = True
        place = torch.where(cuts, torch.arange(length), 0)
        place[:, : case.prompt] = 0
        starts = place.cummax(1).values
    lengths = torch.randint(1, length + 1, (case.batch,)) if case.padding else None
    key = DropoutKey(11, torch.arange(case.batch) + 5)
    options: dict[str, Any] = {
        "causal": case.causal,
        "kv_map": case.kv_map,
        "prompt_length": case.prompt,
        "doc_starts": starts,
        "key_lengths": lengths,
        "dropout": case.dropout,
        "key": key,
        "first_head": 3,
    }
    shape = _Shape(q, k, v, case.kv_map, None)
    seen = seen_keys(shape, case.causal, case.prompt, starts, lengths)
    keys = sample_keys(key)
    kv_map = torch.tensor(shape.kv_map)
    grad, grad_lse = draw(*q.shape), torch.randn(case.batch, case.heads, queries).double()
    return Call(q, k, v, grad, grad_lse, options, seen, shape.positions, keys, kv_map)


def run(ops: Any, case: Case, call: Call, strided: bool = False) -> tuple[Tensor, ...]:
    """Output, log-sum-exp and gradients of the kernels."""

    tensors = [x.to(case.dtype) for x in (call.q, call.k, call.v, call.grad)]
    if strided:  # rows at odd addresses
        tensors = [torch.nn.functional.pad(x, (1, 2))[..., 1:-2] for x in tensors]
    q, k, v, grad = tensors
    rest = call.kv_map, call.seen, call.keys, call.positions, 3, threshold(case.dropout), case.dim**-0.5
    out, lse = ops.expanded_attention(q, k, v, *rest)
    gradients = ops.expanded_attention_backward(grad, call.grad_lse.float(), q, k, v, out, lse, *rest)
    return out, lse, *gradients


def expected(call: Call) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in (call.q, call.k, call.v)]
    out, lse = expanded_attention_reference(*leaves, **call.options)
    sees = lse.isfinite()
    loss = (out * call.grad).sum() + (torch.where(sees, lse, 0.0) * call.grad_lse).sum()
    return out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)


def check(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], tolerance: float) -> None:
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), found, wanted, strict=True):
        x = x.double()
        if name == "lse":
            assert torch.equal(x.isfinite(), y.isfinite())
            x, y = x[y.isfinite()], y[y.isfinite()]
        if y.numel():
            difference = float((x - y).abs().max() / y.abs().max().clamp(min=0.1))
            assert difference < (1e-5 if name == "lse" else tolerance), f"{name} differs by {difference:.1e}"


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_kernels_equal_the_reference(emulated: Any, case: Case) -> None:
    call = make(case)
    check(run(emulated, case, call), expected(call), TOLERANCE[case.dtype])


@pytest.mark.parametrize("seed", range(3))
def test_any_intervals_of_keys_are_seen(emulated: Any, seed: int) -> None:
    """Intervals that no mask of ours makes, empty and reversed ones among them, and far beyond the keys."""
    case = Case(1, 200, 1, 1, 64, queries=70, dtype=torch.float16)
    call = make(case)
    torch.manual_seed(seed)
    seen = torch.randint(-20, 240, (1, 70, 3), dtype=torch.int32)
    seen[:, :64, 0] = torch.randint(0, 200, (64,)) if seed else 0
    seen[:, 5:9] = 0
    column, bounds = torch.arange(200), seen[..., None]
    mask = (column < bounds[:, :, 0]) | ((column >= bounds[:, :, 1]) & (column < bounds[:, :, 2]))
    q, k, v = (x.clone().requires_grad_() for x in (call.q, call.k, call.v))
    scores = torch.einsum("bshd,bthd->bhst", q, k) * case.dim**-0.5
    none = ~mask.any(-1)[:, None]
    lse = scores.masked_fill(~mask[:, None], float("-inf")).masked_fill(none[..., None], 0.0).logsumexp(-1)
    weights = (scores - lse[..., None]).exp().masked_fill(~mask[:, None], 0.0)
    out = torch.einsum("bhst,bthd->bshd", weights, v)
    loss = (out * call.grad).sum() + (lse.masked_fill(none, 0.0) * call.grad_lse).sum()
    wanted = out.detach(), lse.masked_fill(none, float("-inf")).detach(), *torch.autograd.grad(loss, (q, k, v))
    check(run(emulated, case, replace(call, seen=seen)), wanted, TOLERANCE[case.dtype])


@pytest.mark.parametrize("case", [CASES[2], CASES[4], CASES[6]], ids=name_of)
def test_results_do_not_depend_on_the_order_of_threads(
    emulated: Any, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = make(case)
    results = []
    for order in ("forward", "reverse", "1", "2"):
        monkeypatch.setenv("ELLE_MP_EMULATED_ORDER", order)
        results.append(run(emulated, case, call))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_unaligned_rows_give_the_same_bits(emulated: Any) -> None:
    case = Case(1, 70, 2, 1, 64, dropout=0.1)
    call = make(case)
    for x, y in zip(run(emulated, case, call), run(emulated, case, call, strided=True), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("groups, slots", [(2, 3), (1, 4)])
def test_a_fused_projection_gives_the_same_bits(emulated: Any, groups: int, slots: int) -> None:
    case = Case(2, 70, groups * (slots - 2), groups, 64, dropout=0.1)
    call = make(case)
    out, lse, dq, dk, dv = run(emulated, case, call)
    parts = call.q.unflatten(2, (groups, slots - 2)), call.k[:, :, :, None], call.v[:, :, :, None]
    qkv = torch.cat(parts, 3).to(case.dtype)
    rest = call.seen, call.keys, call.positions, 3, threshold(case.dropout), case.dim**-0.5
    packed, packed_lse = emulated.packed_attention(qkv, *rest)
    assert torch.equal(packed, out) and torch.equal(packed_lse, lse)
    grad = call.grad.to(case.dtype)
    gradient = emulated.packed_attention_backward(grad, call.grad_lse.float(), qkv, packed, packed_lse, *rest)
    assert torch.equal(gradient[:, :, :, :-2].flatten(2, 3), dq)
    assert torch.equal(gradient[:, :, :, -2], dk) and torch.equal(gradient[:, :, :, -1], dv)


def test_no_key_and_no_query(emulated: Any) -> None:
    case = replace(CASES[0], text=5, queries=0)
    out, lse, dq, dk, dv = run(emulated, case, make(case))
    assert out.numel() == lse.numel() == dq.numel() == 0
    assert not dk.any() and not dv.any()


def test_what_does_not_fit_is_refused(emulated: Any) -> None:
    case = Case(1, 4, 1, 1, 64)
    call = make(case)
    with pytest.raises(RuntimeError, match="up to 128 elements"):
        big = make(replace(case, dim=136))
        run(emulated, replace(case, dim=136), big)
    with pytest.raises(RuntimeError, match="seen does not fit"):
        run(emulated, case, replace(call, seen=call.seen[:, :2]))
    with pytest.raises(RuntimeError, match="kv_map names no head"):
        run(emulated, case, replace(call, kv_map=torch.tensor([1])))
