"""Attention of some of a sequence's queries: what the whole sequence gives them, masks and gradients included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from elle_mp.ops import chunked_attention as chunked
from elle_mp.ops.attention import attention, attention_reference
from elle_mp.ops.dropout import DropoutKey, sample_keys

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 3e-2}
LENGTH = 48
# One run in front, inside, at the end; two, next to each other or not; a single position.
RUNS = [
    (range(0, 16),),
    (range(13, 30),),
    (range(24, LENGTH),),
    (range(0, 12), range(36, 48)),
    (range(12, 24), range(24, 36)),
    (range(40, 41),),
]


def key_of(batch: int) -> DropoutKey:
    return DropoutKey(3, torch.arange(batch) * 7 + 1)


def of_runs(x: Tensor, runs: tuple[range, ...]) -> Tensor:
    return torch.cat([x[:, run.start : run.stop] for run in runs], 1)


def difference(value: Tensor, expected: Tensor) -> float:
    return ((value.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_some_queries_give_what_they_give_among_all(
    path: str, dtype: torch.dtype, runs: tuple[range, ...], causal: bool, p: float
) -> None:
    """The explicit softmax over all positions in fp64, of which the others' outputs are thrown away."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, LENGTH, heads, 8).bfloat16().to(dtype) for heads in (6, 2, 2))
    upstream = of_runs(torch.randn(2, LENGTH, 6, 8).bfloat16().to(dtype), runs)
    keys = key_of(2)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    whole = attention_reference(*exact, causal, p, sample_keys(keys), 2)
    expected = torch.autograd.grad(of_runs(whole, runs), exact, upstream.double())

    def check(chosen: bool) -> None:
        ours = [of_runs(q, runs).requires_grad_(), k.clone().requires_grad_(), v.clone().requires_grad_()]
        if chosen:
            out = attention(*ours, causal=causal, dropout=p, key=keys, first_head=2, heads=8, runs=runs)
        else:  # also where SDPA would be taken
            grouped = ours[0].unflatten(2, (2, 3))
            out = chunked.chunked_attention(grouped, *ours[1:], causal, p, sample_keys(keys), 2, runs).flatten(2, 3)
        assert out.dtype == dtype and difference(out.detach(), of_runs(whole, runs).detach()) < TOLERANCE[dtype]
        gradients = torch.autograd.grad(out, ours, upstream)
        assert difference(gradients[0], of_runs(expected[0], runs)) < TOLERANCE[dtype]
        assert difference(gradients[1], expected[1]) < TOLERANCE[dtype]
        assert difference(gradients[2], expected[2]) < TOLERANCE[dtype]
        # Keys that none of the queries sees have no gradient at all, not a small one.
        if causal and runs[-1].stop < LENGTH:
            assert not bool(gradients[1][:, runs[-1].stop :].any()) and not bool(gradients[2][:, runs[-1].stop :].any())

    check(chosen=True)
    if path == "torch":
        check(chosen=False)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("causal", [False, True])
def test_masks_are_bitwise_those_of_one_rank(path: str, dtype: torch.dtype, causal: bool) -> None:
    """Values that are rows of the identity make the output the weights: where they are zero, they were dropped."""
    torch.manual_seed(0)
    q, k = (torch.randn(2, LENGTH, 2, LENGTH).to(dtype) * 0.1 for _ in range(2))
    v = torch.eye(LENGTH, dtype=dtype)[None, :, None].expand(2, -1, 2, -1)
    keys = key_of(2)
    whole = attention(q, k, v, causal=causal, dropout=0.4, key=keys)
    # Zero are the dropped ones, and, causal, those of keys to come, which are half of all.
    assert 0.38 < float((whole == 0).double().mean()) - 0.3 * causal < 0.42
    for runs in RUNS:
        some = attention(of_runs(q, runs), k, v, causal=causal, dropout=0.4, key=keys, runs=runs)
        assert torch.equal(some == 0, of_runs(whole, runs) == 0)


@pytest.mark.parametrize("block", [1, 5, 64])
@pytest.mark.parametrize("causal", [False, True])
def test_blocks_end_where_runs_end(block: int, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    runs = (range(3, 14), range(30, 41))
    q, k, v = (torch.randn(2, LENGTH, heads, 8) for heads in (4, 2, 2))
    q, keys = of_runs(q, runs), key_of(2)

    def run() -> tuple[Tensor, ...]:
        ours = [x.clone().requires_grad_() for x in (q, k, v)]
        grouped = ours[0].unflatten(2, (2, 2))
        out = chunked.chunked_attention(grouped, *ours[1:], causal, 0.3, sample_keys(keys), 0, runs)
        return (out.detach(), *torch.autograd.grad(out.square().sum(), ours))

    wanted = run()
    monkeypatch.setattr(chunked, "_BLOCK_ELEMENTS", 4 * LENGTH * block)
    monkeypatch.setattr(chunked, "_CAUSAL_ROWS", 4)
    for value, expected in zip(run(), wanted, strict=True):
        assert difference(value, expected.double()) < 1e-5


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_gradcheck(p: float) -> None:
    torch.manual_seed(0)
    runs = (range(1, 3), range(5, 7))
    q, k, v = (
        torch.randn(2, n, heads, 3, dtype=torch.float64, requires_grad=True) for n, heads in ((4, 4), (8, 2), (8, 2))
    )
    assert torch.autograd.gradcheck(
        lambda q, k, v: attention(q, k, v, causal=True, dropout=p, key=key_of(2), runs=runs), (q, k, v)
    )


@pytest.mark.parametrize("runs", [(range(0, 5),), (range(2, 8), range(8, 10)), (range(6, 12),)])
def test_runs_that_do_not_fit(runs: tuple[range, ...]) -> None:
    q, k = torch.randn(2, 6, 2, 8), torch.randn(2, 10, 2, 8)
    with pytest.raises(ValueError, match="do not fit"):
        attention(q, k, k, causal=True, runs=runs)
