"""Attention on every path against the explicit softmax in fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from elle_mp.ops import chunked_attention as chunked
from elle_mp.ops.attention import attention, attention_reference, packed_attention
from elle_mp.ops.dropout import DropoutKey, sample_keys

# Largest difference over the largest entry. bf16 rounds scores, weights and their gradients (2^-9 each).
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 3e-2}
# Batch, length, groups, query heads to a group, head dim.
SHAPES = [
    (2, 33, 2, 1, 8),
    (2, 64, 2, 3, 16),
    (1, 1, 1, 1, 4),
    (1, 300, 2, 2, 64),
    (0, 5, 2, 1, 8),
    (2, 17, 1, 4, 6),
]


def key_of(batch: int) -> DropoutKey:
    return DropoutKey(3, torch.arange(batch) * 7 + 1)


def slots(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return qkv[:, :, :, :-2].flatten(2, 3), qkv[:, :, :, -2], qkv[:, :, :, -1]


def difference(value: Tensor, expected: Tensor) -> float:
    if expected.numel() == 0:
        return 0.0
    return ((value.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_output_and_gradient_equal_the_reference(
    path: str, dtype: torch.dtype, shape: tuple[int, ...], causal: bool, p: float
) -> None:
    torch.manual_seed(0)
    batch, length, groups, queries, head_dim = shape
    # Values are exact in every dtype, so that the references see the same input.
    qkv = torch.randn(batch, length, groups, queries + 2, head_dim).bfloat16().to(dtype)
    upstream = torch.randn(batch, length, groups * queries, head_dim).bfloat16().to(dtype)
    keys = key_of(batch)

    exact = qkv.double().requires_grad_()
    expected = attention_reference(*slots(exact), causal, p, sample_keys(keys), 2)
    (expected_gradient,) = torch.autograd.grad(expected, exact, upstream.double())

    def check(run: Callable[[Tensor], Tensor]) -> None:
        x = qkv.clone().requires_grad_()
        out = run(x)
        (gradient,) = torch.autograd.grad(out, x, upstream)
        assert out.dtype == dtype and out.shape == expected.shape
        assert difference(out.detach(), expected.detach()) < TOLERANCE[dtype]
        for part, exact_part in zip(slots(gradient), slots(expected_gradient), strict=True):
            # A single key has no gradient through the softmax.
            scale = exact_part if exact_part.numel() and exact_part.abs().max() > 0 else None
            if scale is not None:
                assert difference(part, exact_part) < TOLERANCE[dtype]

    check(lambda x: packed_attention(x, causal=causal, dropout=p, key=keys, first_head=2))
    check(lambda x: attention(*slots(x), causal=causal, dropout=p, key=keys, first_head=2))
    if path == "torch":  # also where SDPA would be taken
        check(lambda x: chunked.chunked_attention(x, None, None, causal, p, sample_keys(keys), 2).flatten(2, 3))


@pytest.mark.parametrize("causal", [False, True])
def test_the_reference_without_dropout_is_sdpa(causal: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 9, heads, 8, dtype=torch.float64) for heads in (6, 2, 2))
    expected = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal, enable_gqa=True
    )
    out = attention_reference(q, k, v, causal, 0.0, None, 0)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block", [1, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_change_no_mask(dtype: torch.dtype, block: int, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(2, 50, 2, 4, 8, dtype=dtype)
    keys = sample_keys(key_of(2))

    def run() -> tuple[Tensor, Tensor]:
        x = qkv.clone().requires_grad_()
        out = chunked.chunked_attention(x, None, None, causal, 0.3, keys, 0)
        return out.detach(), torch.autograd.grad(out.float().square().sum(), x)[0]

    out, gradient = run()
    monkeypatch.setattr(chunked, "_BLOCK_ELEMENTS", 4 * 50 * block)
    monkeypatch.setattr(chunked, "_CAUSAL_ROWS", 16)
    for value, expected in zip(run(), (out, gradient), strict=True):
        assert difference(value, expected.double()) < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_gradcheck(causal: bool, p: float) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(2, 5, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    keys = key_of(2)
    assert torch.autograd.gradcheck(
        lambda x: chunked.chunked_attention(x, None, None, causal, p, sample_keys(keys), 1), qkv
    )
    q, k, v = (torch.randn(2, 5, n, 3, dtype=torch.float64, requires_grad=True) for n in (4, 2, 2))
    assert torch.autograd.gradcheck(
        lambda q, k, v: attention(q, k, v, causal=causal, dropout=p, key=keys, first_head=1), (q, k, v)
    )


def test_ranks_with_half_of_the_heads_each_give_the_whole(path: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 20, heads, 8) for heads in (8, 4, 4))
    keys = key_of(2)
    whole = attention(q, k, v, causal=True, dropout=0.2, key=keys, heads=8)
    halves = [
        attention(
            q[:, :, 4 * rank : 4 * rank + 4],
            k[:, :, 2 * rank : 2 * rank + 2],
            v[:, :, 2 * rank : 2 * rank + 2],
            causal=True,
            dropout=0.2,
            key=keys,
            first_head=4 * rank,
            heads=8,
        )
        for rank in (0, 1)
    ]
    torch.testing.assert_close(torch.cat(halves, 2), whole, rtol=1e-5, atol=1e-6)


def test_strides_and_no_grad(path: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 2, 20, 16).bfloat16().requires_grad_()
    q, k, v = (x[:, i].permute(0, 2, 1, 3)[..., ::2] for i in range(3))
    with torch.no_grad():
        out = attention(q, k, v, causal=True, dropout=0.1, key=key_of(2))
        again = attention(q.contiguous(), k.contiguous(), v.contiguous(), causal=True, dropout=0.1, key=key_of(2))
    assert not out.requires_grad and torch.equal(out, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores_stay_finite(path: str, dtype: torch.dtype) -> None:
    q = torch.full((1, 40, 2, 16), 60.0, dtype=dtype)
    k = torch.randn(1, 40, 2, 16).to(dtype) * 60
    v = torch.randn(1, 40, 2, 16).to(dtype)
    q.requires_grad_()
    out = attention(q, k, v, causal=True, dropout=0.1, key=key_of(1))
    out.float().sum().backward()
    assert bool(out.isfinite().all()) and q.grad is not None and bool(q.grad.isfinite().all())


def test_not_a_number_stays_visible(path: str) -> None:
    qkv = torch.randn(1, 40, 2, 3, 16).bfloat16()
    qkv[0, 7, 1, 0, 3] = float("nan")
    out = packed_attention(qkv, causal=True)
    assert bool(out[0, 7, 1].isnan().all()) and bool(out[0, :7].isfinite().all())


def test_what_does_not_fit() -> None:
    q, k = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 3, 8)
    with pytest.raises(ValueError, match="do not fit"):
        attention(q, k, k, causal=True)
    with pytest.raises(ValueError, match="wants a key"):
        attention(q, q, q, causal=True, dropout=0.1)
    with pytest.raises(ValueError, match="are not among"):
        attention(q, q, q, causal=True, first_head=5, heads=8)
