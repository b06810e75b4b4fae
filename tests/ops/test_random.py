"""Counter-based randomness: a value depends on (seed, name, global index) and on nothing else."""

from __future__ import annotations

from math import erf, sqrt

import numpy as np
import pytest
import torch

from elle_mp.ops import random as random_ops
from elle_mp.ops.random import normal, normal_block, words


def test_a_value_does_not_depend_on_where_the_drawing_starts() -> None:
    everything = words(3, "a", 0, 101)
    assert len(np.unique(everything)) == 101
    for start in (0, 1, 2, 3, 4, 5, 17, 64, 99, 101):
        for count in (0, 1, 3, 4, 6):
            stop = min(start + count, 101)
            np.testing.assert_array_equal(words(3, "a", start, stop - start), everything[start:stop])


def test_words_are_philox_of_the_hashed_name() -> None:
    # The same words from NumPy's generator run from its start: no counter arithmetic of ours.
    import hashlib

    key = int.from_bytes(hashlib.blake2b(b"5/init/x", digest_size=16).digest(), "little")
    np.testing.assert_array_equal(words(5, "init/x", 0, 50), np.random.Philox(key=key, counter=0).random_raw(50))


def test_the_stream_is_the_same_on_every_machine_and_version() -> None:
    # Checkpoints and published runs rest on these values.
    assert words(1, "init/token_table", 10, 2).tolist() == [15084400753797328218, 9258388373302990420]
    np.testing.assert_allclose(
        normal(1, "init/token_table", 10, 2), [-0.4057629500309544, 0.6682760768992998], rtol=1e-14
    )


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
@pytest.mark.parametrize("shape", [(9,), (9, 4), (5, 3, 4), (1, 1)])
def test_a_block_is_a_slice_of_the_whole(shape: tuple[int, ...], tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.from_numpy(normal(2, "w", 0, int(np.prod(shape)))).view(shape)
    monkeypatch.setattr(random_ops, "_TILE", tile)
    draw = np.random.default_rng(0)
    for _ in range(10):
        bounds = tuple(tuple(sorted(draw.integers(0, size + 1, 2).tolist())) for size in shape)
        block = normal_block(2, "w", shape, bounds, torch.float64)  # type: ignore[arg-type]
        assert torch.equal(block, whole[tuple(slice(a, b) for a, b in bounds)])
    everything = normal_block(2, "w", shape, tuple((0, size) for size in shape), torch.float32)
    assert torch.equal(everything, whole.float())
