"""Packed samples, memories and notes, against plain slicing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from elle_mp.data.hashing import compiled_helpers
from elle_mp.data.indexed import IndexedDataset, IndexedWriter
from elle_mp.data.memory import check_budget, choose_memory, long_document_note
from elle_mp.data.packing import PackedSamples, pack
from elle_mp.errors import UserError


def dataset(path: Path, lengths: list[int]) -> IndexedDataset:
    """Tokens count upwards over all documents."""
    with IndexedWriter(path / "a", "i4") as writer:
        start = 0
        for length in lengths:
            writer.add(np.arange(start, start + length))
            start += length
    return IndexedDataset(path / "a")


@pytest.mark.parametrize("total", [0, 1, 7, 8, 9, 15, 16, 17, 100])
@pytest.mark.parametrize(("length", "stride"), [(8, 8), (9, 8), (1, 1), (8, 3)])
def test_samples_are_slices_of_the_stream(total: int, length: int, stride: int) -> None:
    stream = np.arange(total) * 3
    samples = PackedSamples(stream, length, stride)
    starts = [start for start in range(0, total, stride) if start + length <= total]
    assert len(samples) == len(starts)
    wanted = np.array([stream[start : start + length] for start in starts]).reshape(-1, length)
    assert np.array_equal(samples.gather(np.arange(len(starts))), wanted)
    assert np.array_equal(samples.gather_numpy(np.arange(len(starts))), wanted)


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "i4", "i8"])
def test_extension_equals_numpy(dtype: str) -> None:
    if compiled_helpers() is None:
        pytest.skip("the extension is not built")
    info = np.iinfo(dtype)
    stream = np.random.default_rng(0).integers(info.min, info.max, 1000, dtype=dtype, endpoint=True)
    samples = PackedSamples(stream, 17, 16)
    indices = np.random.default_rng(1).integers(0, len(samples), 40)
    ours = samples.gather(indices)
    assert ours.dtype == np.int64 and np.array_equal(ours, samples.gather_numpy(indices))


def test_an_index_outside_is_an_error() -> None:
    samples = PackedSamples(np.arange(20), 8)
    for bad in ([2], [-1], [0, 5]):
        with pytest.raises(IndexError):
            samples.gather(np.array(bad))
    assert samples.gather(np.array([], dtype=np.int64)).shape == (0, 8)


def test_causal_samples_predict_every_token_once(tmp_path: Path) -> None:
    data = dataset(tmp_path, [30, 1, 33])
    samples = pack(data, 9, "causal", "here")
    rows = samples.gather(np.arange(len(samples)))
    assert rows.shape == (7, 10)
    assert rows[:, 1:].reshape(-1).tolist() == list(range(1, 64))
    assert pack(data, 9, "mlm", "here").gather(np.arange(7)).reshape(-1).tolist() == list(range(63))


def test_too_little_text_is_one_line(tmp_path: Path) -> None:
    data = dataset(tmp_path, [5, 4])
    assert len(pack(data, 9, "mlm", "here")) == 1
    with pytest.raises(UserError, match=r"^domain x: 9 tokens of text are too few for one sample of 10"):
        pack(data, 9, "causal", "domain x")


def test_memory_is_a_fixed_seeded_subset() -> None:
    chosen = choose_memory(1000, 128, 128 * 100 + 127, seed=1, domain="docs")
    assert len(chosen) == 100 and len(set(chosen.tolist())) == 100
    assert (np.diff(chosen) > 0).all() and chosen.min() >= 0 and chosen.max() < 1000
    assert np.array_equal(chosen, choose_memory(1000, 128, 128 * 100, seed=1, domain="docs"))
    assert not np.array_equal(chosen, choose_memory(1000, 128, 128 * 100, seed=2, domain="docs"))
    assert not np.array_equal(chosen, choose_memory(1000, 128, 128 * 100, seed=1, domain="code"))
    assert set(choose_memory(1000, 128, 128 * 50, seed=1, domain="docs").tolist()) < set(chosen.tolist())
    thirds = np.histogram(chosen, bins=4, range=(0, 1000))[0]
    assert thirds.min() > 10
    assert choose_memory(5, 128, 10**9, seed=1, domain="docs").tolist() == [0, 1, 2, 3, 4]


def test_budget_below_one_sample_says_the_smallest() -> None:
    check_budget(127, 127)
    with pytest.raises(UserError, match=r"memory.tokens=126 .* the smallest that works is 127"):
        choose_memory(10, 127, 126, seed=1, domain="docs")


def test_a_document_longer_than_the_budget_is_noted_and_nothing_is_lost(tmp_path: Path) -> None:
    data = dataset(tmp_path, [40, 500, 30])
    assert long_document_note(data, 500, "docs") is None
    note = long_document_note(data, 100, "docs")
    assert note is not None and "docs" in note and "500 tokens" in note and "\n" not in note
    samples = pack(data, 19, "mlm", "here")
    assert samples.gather(np.arange(30)).reshape(-1).tolist() == list(range(570))
    assert len(choose_memory(len(samples), 19, 100, seed=1, domain="docs")) == 5
