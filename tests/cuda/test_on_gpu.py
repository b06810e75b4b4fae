"""The CUDA library on a GPU: every op against its reference. Skipped where there is no GPU, or no library."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from elle_mp.ops import expand as expand_module
from elle_mp.ops.dropout import DropoutKey, dropout, sample_keys
from elle_mp.ops.expand import Fresh, Index, Noise, expand
from elle_mp.ops.expanded_attention import expanded_attention, expanded_attention_reference, has_kernel
from elle_mp.ops.library import compiled_ops, what_is_wrong_with_cuda
from elle_mp.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from elle_mp.ops.philox import stream_key
from tests.cuda import norm_cases
from tests.cuda.attention_cases import CASES, TOLERANCE, Case, check, expected, make, name_of, run

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or what_is_wrong_with_cuda() is not None,
    reason="no GPU here, or the CUDA library is not built",
)

LARGE = [
    Case(2, 1000, 4, 2, 64, prompt=16, documents=True, dropout=0.1),
    Case(1, 2048, 2, 1, 128, dropout=0.1),
    Case(2, 777, 3, 3, 128, causal=False, padding=True, dtype=torch.float16),
]


@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=name_of)
def test_attention_equals_the_reference_and_repeats_bitwise(case: Case) -> None:
    call = make(case)
    found = run(torch.ops.elle_mp, case, call, device="cuda")
    check(found, expected(call), TOLERANCE[case.dtype])
    again = run(torch.ops.elle_mp, case, call, device="cuda")
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))


@pytest.mark.parametrize("case", [CASES[4], CASES[6]], ids=name_of)
def test_the_gpu_and_the_emulator_agree(emulated: Any, case: Case) -> None:
    call = make(case)
    gpu, emulation = run(torch.ops.elle_mp, case, call, device="cuda"), run(emulated, case, call)
    check(gpu, tuple(x.double() for x in emulation), TOLERANCE[case.dtype] / 2)


def test_unaligned_rows_give_the_same_bits() -> None:
    case = Case(1, 300, 2, 1, 64, dropout=0.1)
    call = make(case)
    plain = run(torch.ops.elle_mp, case, call, device="cuda")
    strided = run(torch.ops.elle_mp, case, call, strided=True, device="cuda")
    assert all(torch.equal(x, y) for x, y in zip(plain, strided, strict=True))


def test_the_face_of_attention_and_its_autograd() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 150, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    assert has_kernel(q)
    options: dict[str, Any] = {"causal": True, "dropout": 0.1, "key": DropoutKey(1, torch.arange(2))}
    out, _ = expanded_attention(q, k, v, **options)
    wanted, _ = expanded_attention_reference(q.double(), k.double(), v.double(), **options)
    assert (out.double() - wanted).abs().max() < 2e-2 * wanted.abs().max()
    grad = torch.randn_like(out)
    ours = torch.autograd.grad(out, (q, k, v), grad)
    theirs = torch.autograd.grad(wanted, (q, k, v), grad.double())
    for x, y in zip(ours, theirs, strict=True):
        assert (x.double() - y.double()).abs().max() < 2e-2 * y.abs().max()


def test_opcheck_of_attention() -> None:
    call = make(replace(CASES[1], batch=1))
    q, k, v = (x.to("cuda", torch.bfloat16).requires_grad_() for x in (call.q[:1], call.k[:1], call.v[:1]))
    masks = (x.cuda() for x in (call.seen[:1], call.keys[:1], call.positions))
    torch.library.opcheck(torch.ops.elle_mp.expanded_attention, (q, k, v, call.kv_map, *masks, 0, 6000, 0.125))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dropout_has_the_bits_of_the_cpu(dtype: torch.dtype) -> None:
    x, key = torch.randn(3, 70, 1029).to(dtype), DropoutKey(7, torch.arange(3))
    assert sample_keys(key).device.type == "cpu"
    assert torch.equal(dropout(x.cuda(), 0.3, key).cpu(), dropout(x, 0.3, key))


@pytest.mark.skipif(compiled_ops("add_norm") is None, reason="the ops are older")
@pytest.mark.parametrize(
    "case", [*norm_cases.CASES, replace(norm_cases.CASES[3], shape=(4, 500, 2048))], ids=norm_cases.name_of
)
def test_norms_equal_their_formulas_and_repeat_bitwise(case: norm_cases.NormCase) -> None:
    found = norm_cases.run_and_check(torch.ops.elle_mp, case, "cuda")
    again = norm_cases.run_and_check(torch.ops.elle_mp, case, "cuda")
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("drawn", ["nothing", "noise", "fresh"])
def test_growth_has_the_bits_of_the_cpu(drawn: str, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    source = torch.randn(300, 500, dtype=dtype)
    rows, cols = torch.arange(450) * 300 // 450, torch.arange(900) * 500 // 900
    index = Index(rows, cols, torch.rand(450, dtype=torch.float64), torch.rand(900, dtype=torch.float64))
    noise = Noise(stream_key(1, "a"), 0.1, 7, 21, cols) if drawn == "noise" else None
    codes = (torch.randint(0, 3, (n,), dtype=torch.uint8) for n in index.shape)
    fresh = Fresh(stream_key(1, "b"), 0.02, 7, 21, *codes) if drawn == "fresh" else None
    found = torch.empty(index.shape, dtype=dtype, device="cuda")
    expand(source.cuda(), index, found, noise, fresh)
    wanted = torch.empty(index.shape, dtype=dtype)
    expand_module._expand_torch(source, index, wanted, noise, fresh)
    assert torch.equal(found.cpu(), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cross_entropy_equals_the_reference(dtype: torch.dtype) -> None:
    torch.manual_seed(4)

    def leaf(*shape: int) -> Tensor:
        return (torch.randn(shape, device="cuda") * 0.3).to(dtype).requires_grad_()

    hidden, table = leaf(300, 64), leaf(5003, 64)
    targets = torch.randint(0, 5000, (300,), device="cuda")
    targets[::7] = -100
    options = {"vocab_size": 5000, "label_smoothing": 0.1, "z_loss": 1e-3}
    loss = linear_cross_entropy(hidden, table, targets, **options)
    wide = [x.detach().double().requires_grad_() for x in (hidden, table)]
    wanted = linear_cross_entropy_reference(*wide, targets, **options)
    assert abs(float(loss) / float(wanted) - 1) < 2e-3
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    found, exact = torch.autograd.grad(loss, (hidden, table)), torch.autograd.grad(wanted, wide)
    for x, y in zip(found, exact, strict=True):
        assert (x.double() - y).abs().max() < tolerance * y.abs().max()
