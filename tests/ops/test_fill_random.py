"""Random values of new entries: by their place alone, both paths bit for bit, and of the strength asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from elle_mp.ops import expand as module
from elle_mp.ops import native
from elle_mp.ops.expand import FORBIDDEN, KEPT, RANDOM, Fresh, Index, Noise, expand
from elle_mp.ops.philox import stream_key
from tests.ops.test_expand import philox_bits

KEY = stream_key(3, "growth/new")
STD = 0.02


def codes(size: int, seed: int) -> Tensor:
    """Every code, in a random order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(KEPT, FORBIDDEN + 1, (size,), generator=generator, dtype=torch.uint8)


def fill_random(
    out: Tensor,
    rows: Tensor,
    cols: Tensor,
    std: float,
    key: int,
    first_row: int = 0,
    first_col: int = 0,
    first_asked: int = 0,
) -> None:
    """Random values over what was there, which is the growth that copies everything in its place."""
    fresh = Fresh(key, std, first_row, first_col, rows, cols, first_asked)
    expand(out.clone(), Index(torch.arange(len(rows)), torch.arange(len(cols))), out, None, fresh)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (130, 257), (3, 0), (0, 4)])
@pytest.mark.parametrize("compiled", [True, False])
def test_every_entry_is_what_its_codes_and_its_place_say(
    dtype: torch.dtype, shape: tuple[int, int], compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(module, "helpers", lambda name: None)
    elif native.helpers("Expansion") is None:
        pytest.skip("the helpers are not built")
    rows, cols = codes(shape[0], 1), codes(shape[1], 2)
    out = torch.full((shape[0], shape[1] + 3), 7.0, dtype=dtype)[:, :-3]
    fill_random(out, rows, cols, STD, KEY, first_row=2**33 + 5, first_col=6, first_asked=3)
    factor = torch.tensor(STD / (2 * module.FRESH_STD), dtype=torch.float64).to(dtype)
    for i in range(0, shape[0], 7):
        for j in range(0, shape[1], 5):
            number = 6 + j if rows[i] == RANDOM else 3 + int((cols[:j] == RANDOM).sum())
            bits = philox_bits(KEY, 2**33 + 5 + i, number, 16)
            assert out[i, j] == ((2 * bits - 65535) * factor if max(rows[i], cols[j]) == RANDOM else 7.0), (i, j)


@pytest.mark.skipif(native.helpers("Expansion") is None, reason="the helpers are not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_paths_and_any_block_have_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, cols = codes(200, 3), codes(300, 4)
    whole = torch.zeros(200, 300, dtype=dtype)
    fill_random(whole, rows, cols, STD, KEY)
    part = torch.zeros(40, 91, dtype=dtype)
    asked_before = int((cols[:102] == RANDOM).sum())
    fill_random(part, rows[50:90], cols[102:193], STD, KEY, 50, 102, asked_before)
    assert torch.equal(part, whole[50:90, 102:193])
    monkeypatch.setattr(module, "helpers", lambda name: None)
    slow = torch.zeros(200, 300, dtype=dtype)
    fill_random(slow, rows, cols, STD, KEY)
    assert torch.equal(slow, whole)


def test_values_are_uniform_and_independent() -> None:
    out = torch.zeros(600, 500, dtype=torch.float64)
    fill_random(out, torch.full((600,), RANDOM, dtype=torch.uint8), torch.zeros(500, dtype=torch.uint8), STD, KEY)
    assert abs(float(out.mean())) < 4 * STD / out.numel() ** 0.5
    assert float(out.std()) == pytest.approx(STD, rel=0.01)
    assert 0.57 < float((out.abs() < STD).double().mean()) < 0.585 and float(out.abs().max()) < STD * 3**0.5
    assert float(torch.corrcoef(out[:40]).fill_diagonal_(0).abs().max()) < 0.25


def test_what_does_not_fit_is_refused() -> None:
    out = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="a uint8 code for each row and column"):
        fill_random(out, torch.zeros(2), torch.zeros(3, dtype=torch.uint8), STD, KEY)
    codes = torch.zeros(2, dtype=torch.uint8), torch.zeros(3, dtype=torch.uint8)
    for fresh, noise, message in (
        (Fresh(KEY, STD, 0, 0, codes[1], codes[1]), None, "a uint8 code for each row and column"),
        (Fresh(KEY, STD, 0, 0, *codes), Noise(KEY, 0.1, 1, 0, torch.arange(3)), "of the same place"),
    ):
        with pytest.raises(ValueError, match=message):
            expand(torch.zeros(2, 3), Index(torch.arange(2), torch.arange(3)), out, noise, fresh)
