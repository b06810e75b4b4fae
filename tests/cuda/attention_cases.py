"""Calls of attention that the CUDA kernels are tested with, on the emulator and on GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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


def run(ops: Any, case: Case, call: Call, strided: bool = False, device: str = "cpu") -> tuple[Tensor, ...]:
    """Output, log-sum-exp and gradients of the kernels."""

    tensors = [x.to(case.dtype) for x in (call.q, call.k, call.v, call.grad)]
    if strided:  # rows at odd addresses
        tensors = [torch.nn.functional.pad(x, (1, 2))[..., 1:-2] for x in tensors]
    q, k, v, grad = tensors
    masks = (x.to(device) for x in (call.seen, call.keys, call.positions))
    rest = call.kv_map, *masks, 3, threshold(case.dropout), case.dim**-0.5
    out, lse = ops.expanded_attention(q, k, v, *rest)
    gradients = ops.expanded_attention_backward(grad, call.grad_lse.float().to(device), q, k, v, out, lse, *rest)
    return tuple(x.cpu() for x in (out, lse, *gradients))


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
