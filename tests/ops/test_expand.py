"""Growth of one matrix: both paths bit for bit, a block and its whole, and what the noise is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from elle_mp.ops import expand as module
from elle_mp.ops import native
from elle_mp.ops.expand import (
    FORBIDDEN,
    KEPT,
    MAX_COPIES,
    MEAN,
    RANDOM,
    Expansions,
    Fresh,
    Index,
    Noise,
    expand,
)
from elle_mp.ops.philox import philox, random_bits, stream_key

WORD = 0xFFFFFFFF
DTYPES = (torch.float32, torch.float64)
MAPS: dict[str, Callable[[int, int], Tensor]] = {
    "floor": lambda old, new: torch.arange(new) * old // new,
    "tile": lambda old, new: torch.arange(new) % old,
    "identity": lambda old, new: torch.arange(new).clamp_max(old - 1),
    "random": lambda old, new: torch.randint(0, old, (new,)),
}


@pytest.fixture(params=["compiled", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(module, "helpers", lambda name: None)
    elif native.helpers("Expansion") is None:
        pytest.skip("the helpers are not built")
    return str(request.param)


def strided(height: int, width: int, dtype: torch.dtype) -> Tensor:
    """Columns contiguous, rows apart, and at no special address."""
    return torch.randn(height, width + 5, dtype=dtype)[:, 3 : 3 + width]


def philox_bits(key: int, row: int, column: int, count: int) -> int:
    """8 or 16 bits of a word of Philox4x32-10 in Python's integers, after the paper."""
    each = 128 // count
    x = [column // each, row & WORD, row >> 32, 0]
    k = [key & WORD, key >> 32]
    for _ in range(10):
        first, second = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [(second >> 32) ^ x[1] ^ k[0], second & WORD, (first >> 32) ^ x[3] ^ k[1], first & WORD]
        k = [(k[0] + 0x9E3779B9) & WORD, (k[1] + 0xBB67AE85) & WORD]
    whole = sum(word << (32 * place) for place, word in enumerate(x))
    return whole >> (count * (column % each)) & ((1 << count) - 1)


def by_loops(
    source: Tensor, rows: Tensor, cols: Tensor, row_scale: Tensor, col_scale: Tensor, noise: Noise | None
) -> Tensor:
    """Each entry by itself, every step rounded to the type of the tensor."""
    kind = source.numpy().dtype.type
    out = np.zeros((len(rows), len(cols)), dtype=kind)
    for i, r in enumerate(rows.tolist()):
        for j, c in enumerate(cols.tolist()):
            value = kind(source[r, c].item()) * kind(row_scale[i].item() * col_scale[j].item())
            if noise is not None:
                copies = [k for k, g in enumerate(noise.groups.tolist()) if g == noise.groups[j]]
                bits = {k: philox_bits(noise.key, noise.first_row + i, noise.first_col + k, 8) for k in copies}
                factor = kind(noise.strength / (len(copies) * ((2**16 - 1) / 12) ** 0.5))
                value = value + value * (kind(len(copies) * bits[j] - sum(bits.values())) * factor)
            out[i, j] = value
    return torch.from_numpy(out)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([WORD] * 4, (1 << 64) - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_answers(counter: list[int], key: int, words: list[int]) -> None:
    x0, x1, x2, x3 = (np.array([word], dtype=np.uint64) for word in counter)
    assert [int(word[0]) for word in philox((x0, x1, x2, x3), key)] == words


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 4, 7), (4, 40, 5, 61), (1, 1, 1, 3), (5, 1, 8, 1)])
def test_every_entry_is_what_the_description_says(
    path: str, dtype: torch.dtype, noisy: bool, shape: tuple[int, int, int, int]
) -> None:
    old_rows, old_cols, new_rows, new_cols = shape
    rows, cols = MAPS["floor"](old_rows, new_rows), MAPS["random"](old_cols, new_cols)
    source, out = strided(old_rows, old_cols, dtype), strided(new_rows, new_cols, dtype)
    row_scale, col_scale = torch.rand(new_rows).double(), torch.rand(new_cols, dtype=torch.float64)
    noise = Noise(stream_key(1, "w"), 0.1, (1 << 32) - 2, 6, cols) if noisy else None
    expand(source, Index(rows, cols, row_scale, col_scale), out, noise)
    assert torch.equal(out, by_loops(source, rows, cols, row_scale, col_scale, noise))


@pytest.mark.skipif(native.helpers("Expansion") is None, reason="the helpers are not built")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("scales", ["none", "rows", "cols", "both"])
@pytest.mark.parametrize("noisy", ["silent", "pairs", "crowds"])
def test_both_paths_give_the_same_bits(
    dtype: torch.dtype, kind: str, scales: str, noisy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for old_rows, old_cols, new_rows, new_cols in ((3, 5, 0, 7), (3, 5, 4, 0), (9, 301, 13, 443), (40, 1, 60, 1)):
        rows, cols = MAPS["floor"](old_rows, new_rows), MAPS[kind](old_cols, new_cols)
        source = strided(old_rows, old_cols, dtype)
        row_scale = 1.0 / (1 + rows % 3).double() if scales in ("rows", "both") else None
        col_scale = torch.rand(new_cols, dtype=torch.float64) if scales in ("cols", "both") else None
        groups = cols if noisy == "pairs" else -(cols // 16)
        noise = None if noisy == "silent" else Noise(stream_key(2, "w"), 0.3, 11, 5, groups)
        outs = [strided(new_rows, new_cols, dtype), strided(new_rows, new_cols, dtype)]
        expand(source, Index(rows, cols, row_scale, col_scale), outs[0], noise)
        with monkeypatch.context() as context:
            context.setattr(module, "helpers", lambda name: None)
            expand(source, Index(rows, cols, row_scale, col_scale), outs[1], noise)
        assert torch.equal(*outs)


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("width", [1, 15, 33, 64])
def test_nothing_beside_the_block_is_written(path: str, noisy: bool, width: int) -> None:
    around = torch.full((9, width + 10), 7.0)
    out, cols = around[2:7, 4 : 4 + width], torch.arange(width) * 40 // width
    noise = Noise(2, 0.3, 0, 0, torch.arange(width) // 2) if noisy else None
    expand(torch.zeros(3, 40), Index(torch.tensor([0, 0, 1, 2, 2]), cols), out, noise)
    assert not out.any() and (around == 7).sum() == around.numel() - out.numel()


def test_indices_and_scales_of_any_stride(path: str) -> None:
    source, out, expected = torch.randn(6, 8), torch.empty(6, 8), torch.empty(6, 8)
    both = torch.stack((torch.arange(8).flip(0), torch.arange(8)), dim=1)
    scale = torch.rand(8, 2, dtype=torch.float64)
    for target, cols, scales in ((out, both[:, 0], scale[:, 1]), (expected, both[:, 0].clone(), scale[:, 1].clone())):
        expand(source, Index(torch.arange(6), cols, None, scales), target, Noise(2, 0.3, 0, 0, cols // 2))
    assert torch.equal(out, expected)


def test_threads_change_nothing(path: str) -> None:
    rows, cols = MAPS["floor"](130, 201), MAPS["floor"](150, 233)
    source, noise = torch.randn(130, 150), Noise(5, 0.1, 0, 0, cols)
    threads = torch.get_num_threads()
    outs = [torch.empty(201, 233) for _ in range(3)]
    try:
        for out, count in zip(outs, (1, 2, 5), strict=True):
            torch.set_num_threads(count)
            expand(source, Index(rows, cols), out, noise)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_is_the_block_of_the_whole(path: str, dtype: torch.dtype) -> None:
    rows, cols = MAPS["floor"](20, 31), MAPS["floor"](60, 90)
    source = torch.randn(20, 60, dtype=dtype)
    scale = 1.0 / torch.bincount(cols)[cols].double()
    noise = Noise(stream_key(7, "w"), 0.1, 0, 0, cols)
    whole = torch.empty(31, 90, dtype=dtype)
    expand(source, Index(rows, cols, scale[:31], scale), whole, noise)
    for top, bottom, left, right in ((0, 31, 0, 90), (5, 6, 0, 90), (9, 31, 3, 87), (0, 31, 33, 36), (30, 31, 6, 90)):
        out = torch.empty(bottom - top, right - left, dtype=dtype)
        part = replace(noise, first_row=top, first_col=left, groups=cols[left:right])
        expand(source, Index(rows[top:bottom], cols[left:right], scale[top:bottom], scale[left:right]), out, part)
        assert torch.equal(out, whole[top:bottom, left:right])


@pytest.mark.skipif(native.helpers("Expansion") is None, reason="the helpers are not built")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noisy", ["silent", "noise", "alone"])
@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 1, 5, 6), (7, 301, 11, 443), (40, 2, 60, 3), (3, 129, 4, 150), (400, 500, 600, 701)]
)
def test_both_paths_give_the_same_bits_with_means_and_random_values(
    dtype: torch.dtype, noisy: str, fresh: bool, shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(shape[1])
    old_rows, old_cols, new_rows, new_cols = shape
    rows, cols = MAPS["floor"](old_rows, new_rows), MAPS["floor"](old_cols, new_cols)
    groups = cols.clone()
    rows[torch.rand(new_rows, generator=generator) < 0.3] = MEAN
    cols[torch.rand(new_cols, generator=generator) < 0.3] = MEAN
    row_scale, col_scale = (torch.rand(size, dtype=torch.float64, generator=generator) for size in (new_rows, new_cols))
    codes = [torch.randint(KEPT, FORBIDDEN + 1, (n,), dtype=torch.uint8, generator=generator) for n in shape[2:]]
    noise = None if noisy == "silent" else Noise(stream_key(2, "w"), 0.3, 11, 5, groups, alone=noisy == "alone")
    drawn = Fresh(stream_key(2, "v"), 0.02, 11, 5, codes[0], codes[1]) if fresh else None
    source, outs = strided(old_rows, old_cols, dtype), [strided(new_rows, new_cols, dtype) for _ in range(2)]
    expand(source, Index(rows, cols, row_scale, col_scale), outs[0], noise, drawn)
    monkeypatch.setattr(module, "helpers", lambda name: None)
    expand(source, Index(rows, cols, row_scale, col_scale), outs[1], noise, drawn)
    assert torch.equal(*outs)
    assert not fresh or bool((torch.maximum(codes[0][:, None], codes[1]) == RANDOM).any())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2, 7, 48])
def test_a_mean_is_the_mean_of_its_axis_without_noise(path: str, dtype: torch.dtype, size: int) -> None:
    source, out = strided(size, 11, dtype), torch.empty(4, 13, dtype=dtype)
    rows, cols = torch.tensor([0, MEAN, size - 1, MEAN]), torch.tensor([*range(11), MEAN, MEAN])
    scale = torch.linspace(0.5, 1.5, 13, dtype=torch.float64)
    expand(source, Index(rows, cols, None, scale), out, Noise(1, 0.1, 0, 0, torch.tensor([0] * 11 + [1, 2])))
    close: dict[str, float] = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    exact = source.double()
    means = torch.cat([exact, exact.mean(1, keepdim=True).expand(-1, 2)], 1).mean(0) * scale
    torch.testing.assert_close(out[[1, 3]].double(), means.expand(2, -1), **close)
    wanted = exact[[0, size - 1]].mean(1, keepdim=True) * scale[11:]
    torch.testing.assert_close(out[[0, 2], 11:].double(), wanted, **close)


def test_the_noise_alone_is_what_noise_adds(path: str) -> None:
    source, cols = torch.randn(30, 40, dtype=torch.float64), MAPS["floor"](40, 60)
    noise = Noise(3, 0.5, 0, 0, cols)
    outs = [torch.empty(30, 60, dtype=torch.float64) for _ in range(3)]
    for out, made in zip(outs, (None, noise, replace(noise, alone=True)), strict=True):
        expand(source, Index(torch.arange(30), cols), out, made)
    torch.testing.assert_close(outs[0] + outs[2], outs[1], rtol=1e-15, atol=1e-15)
    assert bool(outs[2].any())


@pytest.mark.parametrize("width", [255, 512, 701])
def test_a_matrix_beyond_the_caches_and_what_is_around_it(path: str, width: int) -> None:
    around = torch.full((1100, width + 9), 7.0)
    out, source = around[40:1060, 3 : 3 + width], torch.randn(340, width)
    assert out.numel() * 4 > 1 << 20 or width == 255
    expand(source, Index(torch.arange(1020) // 3, torch.arange(width)), out)
    assert torch.equal(out, source.repeat_interleave(3, 0))
    assert (around == 7).sum() == around.numel() - out.numel()


def test_a_scale_of_one_changes_no_bit(path: str) -> None:
    source = torch.randn(6, 50) * torch.tensor([1e-42, 1.0, 1e38, 1e-20, 0.0, 3.0])[:, None]
    ones, out = torch.ones(50, dtype=torch.float64), torch.empty(6, 50)
    expand(source, Index(torch.arange(6), torch.arange(50), ones[:6], ones), out, Noise(1, 0.5, 0, 0, torch.arange(50)))
    assert torch.equal(out.view(torch.int32), source.view(torch.int32))


def test_copies_of_a_unit_keep_their_sum(path: str) -> None:
    groups = torch.arange(120) // 3
    source, out = torch.randn(50, 40, dtype=torch.float64), torch.empty(50, 120, dtype=torch.float64)
    expand(source, Index(torch.arange(50), groups), out, Noise(3, 0.5, 0, 0, groups))
    assert not torch.equal(out, source[:, groups])
    torch.testing.assert_close(out.view(50, 40, 3).sum(-1), 3 * source, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("copies", [1, 2, 5, 64])
def test_the_strength_of_the_noise(path: str, copies: int) -> None:
    groups = torch.arange(640) // copies
    source, out = torch.ones(400, 640, dtype=torch.float64), torch.empty(400, 640, dtype=torch.float64)
    expand(source, Index(torch.arange(400), torch.arange(640)), out, Noise(stream_key(4, "w"), 0.1, 0, 0, groups))
    expected = 0.1 * (1 - 1 / copies) ** 0.5
    assert abs((out - 1).square().mean().sqrt().item() - expected) <= 0.01 * expected
    centred = out - 1
    neighbours = (centred[:, copies:] * centred[:, :-copies]).mean() + (centred[1:] * centred[:-1]).mean()
    assert abs(neighbours.item()) <= 5 * 2**0.5 * expected**2 / (400 * 640 / copies) ** 0.5


def test_bits_are_uniform() -> None:
    bits = random_bits(stream_key(0, "w"), 0, 0, 300, 1000)
    assert bits.min() >= 0 and bits.max() <= 65535 and abs(bits.mean() - 32767.5) < 5 * 65536 / (12 * 300000) ** 0.5
    counts = np.bincount(bits.reshape(-1) >> 8, minlength=256)
    assert abs(((counts - 300000 / 256) ** 2).sum() * 256 / 300000 - 255) < 5 * 510**0.5  # chi-squared
    assert not np.array_equal(bits, random_bits(stream_key(0, "v"), 0, 0, 300, 1000))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_growths_made_later_are_the_same(path: str, threads: int) -> None:
    """Also of more parts than one, of means, and with nothing of them held here."""
    wanted, outs = [], []
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with Expansions() as later:
            for number in range(12):
                height, width = 700 + number, 1700 + 31 * number
                source = torch.randn(height * 2 // 3, width * 2 // 3)
                rows, cols = torch.arange(height) * 2 // 3, torch.arange(width) * 2 // 3
                rows = torch.where(torch.arange(height) % 5 == 4, MEAN, rows.clamp_max(len(source) - 1))
                cols = cols.clamp_max(source.shape[1] - 1)
                index = Index(rows, cols, None, torch.rand(width, dtype=torch.float64))
                noise = Noise(stream_key(number, "w"), 0.1, 0, 0, cols) if number % 2 else None
                pair = [torch.empty(height, width) for _ in range(2)]
                expand(source, index, pair[0], noise)
                expand(source, index, pair[1], noise, later=later)
                wanted.append(pair[0])
                outs.append(pair[1])
                if number == 6:
                    later.finish()
                    assert all(map(torch.equal, outs, wanted))
            zeros = torch.ones(3, 50_001)[:, 1:], torch.ones(3, 50_001)
            for out in zeros:
                later.zero(out)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, outs, wanted)) and not any(out.any() for out in zeros)


@pytest.mark.skipif(native.helpers("Expansion") is None, reason="the helpers are not built")
def test_what_goes_wrong_later_is_said_on_finishing() -> None:
    width = MAX_COPIES + 1
    groups, out = torch.zeros(width, dtype=torch.int64), torch.empty(1, width)
    with pytest.raises(ValueError, match=f"at most {MAX_COPIES} copies"), Expansions() as later:
        expand(torch.ones(1, 1), Index(torch.zeros(1).long(), groups), out, Noise(1, 0.1, 0, 0, groups), later=later)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("drawn", [False, True])
def test_opcheck(path: str, dtype: torch.dtype, drawn: bool) -> None:
    source, out, cols = torch.randn(4, 20, dtype=dtype), torch.empty(6, 33, dtype=dtype), MAPS["floor"](20, 33)
    index = Index(MAPS["floor"](4, 6), cols, None, torch.rand(33, dtype=torch.float64))
    key = (1 << 64) - 3  # beyond what an op's number can be without a sign
    noise = Noise(key, 0.1, 2, 5, cols) if drawn else None
    codes = torch.randint(0, 3, (6,), dtype=torch.uint8), torch.randint(0, 3, (33,), dtype=torch.uint8)
    fresh = Fresh(key, 0.02, 2, 5, *codes, 3) if drawn else None
    arguments = module._arguments(source, index, out, noise, fresh)
    torch.library.opcheck(torch.ops.elle_mp.expand, arguments)
    torch.ops.elle_mp.expand(*arguments)
    expected = torch.empty_like(out)
    module._expand_torch(source, index, expected, noise, fresh)
    assert torch.equal(out, expected)


def test_the_key_is_a_digest_of_seed_and_name() -> None:
    assert stream_key(3, "layers.0.w") == stream_key(3, "layers.0.w") < 1 << 64
    assert len({stream_key(3, "a"), stream_key(4, "a"), stream_key(3, "b")}) == 3


def test_an_older_build_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(module, "helpers", lambda name: asked.append(name))
    source, out = torch.randn(2, 3), torch.empty(3, 4)
    expand(source, Index(torch.tensor([0, 1, 1]), torch.tensor([2, 0, 1, 2])), out)
    assert asked == ["Expansion"] and torch.equal(out, source[[0, 1, 1]][:, [2, 0, 1, 2]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.tensor([0, 2])}, "indices from 0 to 1"),
        ({"cols": torch.tensor([-2, 0, 1])}, "indices from 0 to 2"),
        ({"source": torch.zeros(2, 3, dtype=torch.float64)}, "both fp32 or both fp64"),
        ({"out": torch.zeros(2, 4)}, r"out \[2, 3\]"),
        ({"out": torch.zeros(3, 2).T}, "contiguous columns"),
        ({"col_scale": torch.ones(3)}, "col_scale fp64"),
        ({"row_scale": torch.ones(3, dtype=torch.float64)}, "row_scale fp64"),
        ({"rows": torch.tensor([0, 1], dtype=torch.int32)}, "int64"),
        ({"noise": Noise(0, 0.1, 0, 0, torch.arange(2))}, "groups int64"),
    ],
)
def test_what_does_not_fit_is_said(path: str, change: dict[str, object], message: str) -> None:
    given: dict[str, object] = {
        "source": torch.zeros(2, 3),
        "rows": torch.arange(2),
        "cols": torch.arange(3),
        "row_scale": None,
        "col_scale": None,
        "out": torch.zeros(2, 3),
    }
    given |= change
    with pytest.raises(ValueError, match=message):
        index = Index(*(given.pop(name) for name in ("rows", "cols", "row_scale", "col_scale")))  # type: ignore[arg-type]
        expand(index=index, **given)  # type: ignore[arg-type]
