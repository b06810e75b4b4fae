"""Dropout masks: what they are a function of, how random they look, and the gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from elle_mp.ops.dropout import DropoutKey, dropout, keep_mask, keep_scale, sample_keys, threshold

WORD = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def key_of(batch: int, seed: int = 3) -> DropoutKey:
    return DropoutKey(seed, torch.arange(batch) * 1000 + 17)


def mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def kept(seed: int, sample: int, row: int, column: int, p: float) -> bool:
    """One element of the mask in Python's integers, written from the module's description."""
    row_key = mix((mix(mix((sample + GOLDEN) & WORD) ^ seed) + GOLDEN * (row + 1)) & WORD)
    low, high, mask = row_key & 0xFFFFFFFF, row_key >> 32, 0xFFFFFFFF
    word = (column // 2 + low) & mask
    word = ((word ^ (word >> 16)) * 0x21F0AAAD) & mask
    word ^= high
    word = ((word ^ (word >> 15)) * 0x735A2D97) & mask
    word ^= word >> 15
    bits = word >> 16 if column % 2 else word & 0xFFFF
    return bits >= round(p * 65536)


@pytest.mark.parametrize("seed", [0, 5, WORD, 1 << 63])
def test_the_mask_is_what_its_description_says(seed: int) -> None:
    samples = [0, 1, -4, 2**62 + 5]
    mask = keep_mask(sample_keys(DropoutKey(seed, torch.tensor(samples))), 7, 5, 9, 0.4)
    expected = [[[kept(seed, s, 7 + row, c, 0.4) for c in range(9)] for row in range(5)] for s in samples]
    assert mask.tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 8, 64), (3, 1, 33), (2, 9, 1), (0, 4, 8), (2, 0, 8), (2, 3, 31)])
def test_every_path_gives_the_same_bits(path: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    x, key = torch.randn(shape, dtype=dtype), key_of(shape[0])
    out = dropout(x, 0.3, key, first_row=11)
    keep = keep_mask(sample_keys(key), 11, shape[1], shape[2], 0.3)
    wide = x.double() if dtype == torch.float64 else x.float()
    expected = torch.where(keep, wide * keep_scale(0.3), 0.0).to(dtype)
    assert out.dtype == dtype and torch.equal(out, expected)


def test_threads_and_strides_change_nothing(path: str) -> None:
    x = torch.randn(4, 40, 48, dtype=torch.float64).to(torch.bfloat16)
    strided = torch.empty(4, 48, 80, dtype=x.dtype)[:, :, ::2].transpose(1, 2).copy_(x)
    threads = torch.get_num_threads()
    outs = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            outs += [dropout(x, 0.2, key_of(4)), dropout(strided, 0.2, key_of(4))]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_a_cut_batch_or_sequence_has_the_same_masks(path: str) -> None:
    x, key = torch.ones(4, 12, 20), key_of(4)
    whole = dropout(x, 0.25, key)
    assert torch.equal(dropout(x[2:], 0.25, DropoutKey(key.seed, key.samples[2:])), whole[2:])
    assert torch.equal(dropout(x[:, 5:], 0.25, key, first_row=5), whole[:, 5:])


@pytest.mark.parametrize("p", [1e-4, 0.1, 0.5, 0.9])
def test_the_share_that_is_dropped(p: float) -> None:
    mask = keep_mask(sample_keys(key_of(64)), 0, 256, 256, p)
    count = mask.numel()
    deviation = (p * (1 - p) / count) ** 0.5
    assert abs((~mask).double().mean().item() - threshold(p) / 65536) < 5 * deviation
    assert abs(threshold(p) / 65536 - p) <= 2.0**-17
    assert keep_scale(p) == 65536 / (65536 - threshold(p))


def correlation(a: Tensor, b: Tensor) -> float:
    return float(np.corrcoef(a.flatten().double().numpy(), b.flatten().double().numpy())[0, 1])


def test_neighbours_samples_and_sites_are_independent() -> None:
    key = DropoutKey(9, torch.arange(8))
    mask = keep_mask(sample_keys(key), 0, 256, 512, 0.5)
    bound = 5 / mask[1:].numel() ** 0.5
    for shift in (1, 2, 3, 4, 16, 32):
        assert abs(correlation(mask[..., shift:], mask[..., :-shift])) < bound
        assert abs(correlation(mask[:, shift:], mask[:, :-shift])) < bound
    assert abs(correlation(mask[1:], mask[:-1])) < bound
    for site in range(4):
        other = keep_mask(sample_keys(key.site(site)), 0, 256, 512, 0.5)
        assert abs(correlation(mask, other)) < bound
        assert abs(correlation(keep_mask(sample_keys(key.site(site + 1)), 0, 256, 512, 0.5), other)) < bound
    # Rows and columns as wholes: the number of kept elements must vary as a binomial number does.
    for dim in (1, 2):
        variance = mask.double().sum(dim).var().item() / (mask.shape[dim] * 0.25)
        assert 0.9 < variance < 1.1


def test_every_level_is_equally_likely() -> None:
    masks = [keep_mask(sample_keys(key_of(32)), 0, 64, 1024, p / 16).sum().item() for p in range(16)]
    counts = -np.diff([*masks, 0])
    expected = 32 * 64 * 1024 / 16
    assert ((counts - expected) ** 2 / expected).sum() < 45  # chi-square of 15 degrees: 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_has_the_mask_of_the_output(path: str, dtype: torch.dtype) -> None:
    x = torch.ones(3, 9, 35, dtype=dtype, requires_grad=True)
    out = dropout(x, 0.4, key_of(3))
    out.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, out.detach())


def test_gradients_of_both_orders(path: str) -> None:
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    key = key_of(2)
    assert torch.autograd.gradcheck(lambda x: dropout(x, 0.3, key), x)
    assert torch.autograd.gradgradcheck(lambda x: dropout(x, 0.3, key), x)


def test_nothing_to_drop_is_the_input_itself() -> None:
    x = torch.randn(2, 3, 5)
    assert dropout(x, 0.0, key_of(2)) is x


def test_no_graph_without_gradients(path: str) -> None:
    with torch.no_grad():
        assert not dropout(torch.ones(2, 3, 5, requires_grad=True), 0.5, key_of(2)).requires_grad


@pytest.mark.parametrize("p", [-0.1, 1.0, 2.0])
def test_a_probability_out_of_range(p: float) -> None:
    with pytest.raises(ValueError, match="probability"):
        dropout(torch.ones(2, 3, 5), p, key_of(2))


def test_a_key_for_another_batch() -> None:
    with pytest.raises(ValueError, match="samples"):
        dropout(torch.ones(2, 3, 5), 0.1, key_of(3))
