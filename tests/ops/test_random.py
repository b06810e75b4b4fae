"""Counter-based randomness: a value depends on (seed, name, global index) and on nothing else."""

from __future__ import annotations

import hashlib
from math import cos, erf, log, pi, sin, sqrt

import numpy as np
import pytest
import torch

from elle_mp.ops import random as random_ops
from elle_mp.ops.philox import signed, stream_key
from elle_mp.ops.random import normal, normal_block, words
from tests.ops.test_expand import philox_bits

WORDS = [16033313904522553905, 18404820330420280952]
NORMALS = [-0.2303141058273824, -1.738480081209046]
BITS = "0da4640bc000e346df1f46b11b2d3827c37ec7b19ed1e68ae98f535609516a29"

needs_op = pytest.mark.skipif(random_ops._KERNELS is None, reason="the ops are not built")


def test_a_value_does_not_depend_on_where_the_drawing_starts() -> None:
    everything = words(3, "a", 0, 101)
    assert len(np.unique(everything)) == 101
    for start in (0, 1, 2, 3, 4, 5, 17, 64, 99, 101):
        for count in (0, 1, 3, 4, 6):
            stop = min(start + count, 101)
            np.testing.assert_array_equal(words(3, "a", start, stop - start), everything[start:stop])


def test_numbers_are_those_of_the_published_generator() -> None:
    """Philox4x32-10 in Python's integers, Box and Muller in Python's floats; the places as the module says."""
    key = int.from_bytes(hashlib.blake2b(b"5/init/x", digest_size=8).digest(), "little")
    numbers, raw = normal(5, "init/x", 0, 200), words(5, "init/x", 0, 64)
    for counter in range(32):
        whole = sum(philox_bits(key, 0, 8 * counter + part, 16) << (16 * part) for part in range(8))
        assert raw[2 * counter] == whole & ((1 << 64) - 1) and raw[2 * counter + 1] == whole >> 64
        word = [whole >> (32 * part) & 0xFFFFFFFF for part in range(4)]
        for pair in range(2):
            radius = sqrt(-2 * log((word[2 * pair] + 0.5) / 2**32))
            angle = 2 * pi * (word[2 * pair + 1] + 0.5) / 2**32
            place = 64 * (counter // 16) + 32 * pair + counter % 16
            assert numbers[place] == pytest.approx(radius * cos(angle), rel=1e-9, abs=1e-12)
            assert numbers[place + 16] == pytest.approx(radius * sin(angle), rel=1e-9, abs=1e-12)


def test_the_stream_is_the_same_on_every_machine_and_version() -> None:
    # Checkpoints and published runs rest on these values.
    assert words(1, "init/token_table", 10, 2).tolist() == WORDS
    np.testing.assert_allclose(normal(1, "init/token_table", 10, 2), NORMALS, rtol=1e-12)


@needs_op
def test_the_compiled_numbers_are_a_few_roundings_away() -> None:
    exact = normal(3, "w", 0, 1 << 20)
    numbers = normal_block(3, "w", (1 << 20,), ((0, 1 << 20),), torch.float32).numpy()
    assert (np.abs(numbers - exact) <= 6 * np.spacing(np.abs(exact).astype(np.float32))).all()
    assert (numbers != exact.astype(np.float32)).mean() < 0.6


@needs_op
def test_every_level_gives_the_same_bits(level: str) -> None:
    """Replicas are drawn on machines that differ."""
    block = normal_block(3, "w", (1000, 77), ((1, 999), (3, 70)), torch.float32)
    assert hashlib.sha256(block.numpy().tobytes()).hexdigest() == BITS


@needs_op
def test_large_places_in_a_stream() -> None:
    """Beyond 2^32 counters the second word counts."""
    out, start = torch.empty(2, 70), (1 << 36) - 100
    torch.ops.elle_mp.philox_normal(out, signed(stream_key(3, "w")), start, 70)
    np.testing.assert_allclose(out.flatten().numpy(), normal(3, "w", start, 140), rtol=1e-5, atol=1e-6)
    assert not np.allclose(normal(3, "w", start, 140), normal(3, "w", start - (1 << 36) + 128, 140))


@needs_op
def test_threads_change_nothing(two_threads: None) -> None:
    bounds = ((0, 300), (0, 700)), ((1, 300), (1, 700))
    twice = [normal_block(3, "w", (300, 700), item, torch.float32) for item in bounds]
    torch.set_num_threads(1)
    assert all(
        torch.equal(x, normal_block(3, "w", (300, 700), b, torch.float32)) for x, b in zip(twice, bounds, strict=True)
    )
    torch.set_num_threads(2)


@needs_op
def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.elle_mp.philox_normal, (torch.empty(3, 70), 5, 11, 70))
    for wrong in (torch.empty(3, 70, dtype=torch.float64), torch.empty(70), torch.empty(70, 3).t()):
        with pytest.raises(RuntimeError, match="philox_normal"):
            torch.ops.elle_mp.philox_normal(wrong, 5, 11, 70)


def test_seeds_and_names_give_other_streams() -> None:
    streams = [normal(seed, name, 0, 4000) for seed in (1, 2) for name in ("a", "b")]
    for i, one in enumerate(streams):
        for other in streams[:i]:
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.06


def test_the_values_are_standard_normal() -> None:
    x = np.sort(normal(11, "gauss", 0, 200_000))
    assert np.isfinite(x).all()
    exact = np.array([0.5 * (1 + erf(v / sqrt(2))) for v in x[::100]])
    empirical = (np.arange(len(x)) + 0.5)[::100] / len(x)
    assert np.abs(exact - empirical).max() < 1.63 / sqrt(len(x))  # Kolmogorov-Smirnov at 1 %
    y = normal(11, "gauss", 0, 200_000)
    for lag in (1, 2, 3, 4):
        assert abs(np.corrcoef(y[:-lag], y[lag:])[0, 1]) < 0.01


@pytest.mark.parametrize("tile", [1, 7, 12, 1 << 20])
@pytest.mark.parametrize("shape", [(9,), (9, 4), (5, 3, 4), (3, 2, 40, 5), (1, 1), (3, 200)])
def test_a_block_is_a_slice_of_the_whole(shape: tuple[int, ...], tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.from_numpy(normal(2, "w", 0, int(np.prod(shape)))).view(shape)
    everything = tuple((0, size) for size in shape)
    single = normal_block(2, "w", shape, everything, torch.float32)
    torch.testing.assert_close(single, whole.float(), rtol=1e-6, atol=0)
    monkeypatch.setattr(random_ops, "_TILE", tile)
    draw = np.random.default_rng(0)
    for _ in range(10):
        bounds = tuple(tuple(sorted(draw.integers(0, size + 1, 2).tolist())) for size in shape)
        cut = tuple(slice(a, b) for a, b in bounds)
        assert torch.equal(normal_block(2, "w", shape, bounds, torch.float64), whole[cut])  # type: ignore[arg-type]
        assert torch.equal(normal_block(2, "w", shape, bounds, torch.float32), single[cut])  # type: ignore[arg-type]
    assert torch.equal(normal_block(2, "w", shape, everything, torch.bfloat16), single.bfloat16())
    monkeypatch.setattr(random_ops, "_KERNELS", None)
    assert torch.equal(normal_block(2, "w", shape, everything, torch.float32), whole.float())
