"""The CUDA kernels of attention, on the emulator, against the explicit softmax in fp64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from elle_mp.ops.dropout import threshold
from tests.cuda.attention_cases import CASES, TOLERANCE, Case, check, expected, make, name_of, run


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
