"""The order of samples: a bijection, exact replay, epochs without repeats, nothing of ranks or of run
lengths.
"""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from math import floor

import numpy as np
import pytest

from elle_mp.data.hashing import compiled_helpers, derive_key, mix64
from elle_mp.data.order import NEW_DOMAIN, PhaseOrder, permute, permute_numpy

SIZES = (1, 2, 3, 7, 16, 17, 100, 1000, 4097, 65536, 100_003)


def splitmix_finaliser(x: int) -> int:
    """The published constants in plain integers."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def test_mix64_equals_plain_integers() -> None:
    values = [0, 1, 2**63, 2**64 - 1, 0x123456789ABCDEF]
    assert mix64(np.array(values, dtype=np.uint64)).tolist() == [splitmix_finaliser(value) for value in values]
    # The first outputs of SplitMix64 seeded with 0, from Vigna's reference program.
    steps = np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert mix64(steps).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_keys_of_different_names_differ() -> None:
    parts = [(seed, stage, name) for seed in range(10) for stage in range(10) for name in ("a", "b")]
    assert len({derive_key(*part) for part in parts}) == len(parts)
    assert derive_key(1, 23) != derive_key(12, 3)
    assert derive_key("mlm", 1) == derive_key("mlm", 1)


@pytest.mark.parametrize("n", SIZES)
def test_permutation_is_a_bijection(n: int) -> None:
    for key in (0, 1, 2**64 - 1):
        assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n, dtype=np.uint64))
        assert np.array_equal(np.sort(permute_numpy(np.arange(n, dtype=np.uint64), n, key)), np.arange(n))


@pytest.mark.skipif(compiled_helpers() is None, reason="the extension is not built")
@pytest.mark.parametrize("n", [*SIZES, 2**31 + 11, 2**40 - 1, 2**62 - 1])
def test_extension_equals_numpy(n: int) -> None:
    rng = np.random.default_rng(n)
    indices = rng.integers(0, n, size=(50, 7)).astype(np.uint64)
    for key in (0, 12345, 2**64 - 1):
        assert np.array_equal(permute(indices, n, key), permute_numpy(indices, n, key))


def test_permutations_look_random() -> None:
    n, keys = 10, 4000
    table = np.array([permute(np.arange(n), n, derive_key("test", key)) for key in range(keys)])
    for place in range(n):  # every value about equally often in every place: chi-squared with 9 degrees of freedom
        counts = np.bincount(table[:, place].astype(int), minlength=n)
        assert ((counts - keys / n) ** 2 / (keys / n)).sum() < 35
    big = permute(np.arange(100_000), 100_000, 9).astype(float)
    assert abs(np.corrcoef(big[:-1], big[1:])[0, 1]) < 0.015
    assert abs(np.corrcoef(big, np.arange(100_000))[0, 1]) < 0.015


def test_an_index_outside_is_an_error() -> None:
    with pytest.raises(ValueError, match="not below n"):
        permute(np.array([5]), 5, 0)
    with pytest.raises(ValueError, match="not below n"):
        permute_numpy(np.array([5], dtype=np.uint64), 5, 0)
    with pytest.raises(ValueError, match="must lie in"):
        permute(np.array([0]), 0, 0)


def order(**changes: object) -> PhaseOrder:
    """An order with three memories."""
    fields: dict[str, object] = dict(seed=3, stage=2, phase=1, new=101, memories=[13, 29, 7], replay=0.1, batch=16)
    return PhaseOrder(**(fields | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("replay", [0.0, 0.1, 0.3, 1 / 3, 0.25, 0.999])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_replay_share_is_exact(replay: float, batch: int) -> None:
    wanted = Fraction(repr(replay)).limit_denominator(10**6)
    plan = order(replay=replay, batch=batch)
    for step in (*range(40), 10**9):
        replayed = int((plan.slots(step).source != NEW_DOMAIN).sum())
        assert replayed == floor((step + 1) * batch * wanted) - floor(step * batch * wanted)


def test_replay_is_spread_over_the_batch() -> None:
    source = order(replay=0.25, batch=64).slots(5).source
    assert [(part != NEW_DOMAIN).sum() for part in np.split(source, 8)] == [2] * 8


def test_earlier_domains_take_turns() -> None:
    plan = order(replay=0.3)
    sources = np.concatenate([plan.slots(step).source for step in range(100)])
    turns = sources[sources != NEW_DOMAIN]
    counts = Counter(turns.tolist())
    assert max(counts.values()) - min(counts.values()) <= 1
    assert np.array_equal(turns[3:], turns[:-3])
    starts = {int(order(seed=seed, new=0).slots(0).source[0]) for seed in range(30)}
    assert starts == {0, 1, 2}


@pytest.mark.parametrize("new", [101, 0])
def test_no_sample_repeats_within_an_epoch(new: int) -> None:
    plan = order(new=new, replay=0.3)
    slots = [plan.slots(step) for step in range(60)]
    source = np.concatenate([item.source for item in slots])
    sample = np.concatenate([item.sample for item in slots])
    counts = dict(enumerate(plan.memories)) | ({NEW_DOMAIN: new} if new else {})
    assert set(np.unique(source).tolist()) == set(counts)
    for name, count in counts.items():
        read = sample[source == name]
        epochs = [read[start : start + count] for start in range(0, len(read), count)]
        assert len(epochs) > 2
        for epoch in epochs[:-1]:
            assert np.array_equal(np.sort(epoch), np.arange(count))
        assert len(set(epochs[-1].tolist())) == len(epochs[-1])
        assert not np.array_equal(epochs[0], epochs[1])


def test_serials_count_the_slots() -> None:
    plan = order()
    assert np.array_equal(np.concatenate([plan.slots(step).serial for step in range(3)]), np.arange(48))


def test_steps_stand_alone() -> None:
    """Asked for in any order, alone or again: the same (a resumed run, or one of another length, sees no
    difference).
    """
    forward = [order().slots(step) for step in range(20)]
    for step in (19, 3, 11, 3):
        again = order().slots(step)
        assert all(
            np.array_equal(a, b) for a, b in zip(vars(again).values(), vars(forward[step]).values(), strict=True)
        )


@pytest.mark.parametrize("change", [{"seed": 4}, {"stage": 3}, {"phase": 0}])
def test_seed_stage_and_phase_change_the_order(change: dict[str, int]) -> None:
    assert not np.array_equal(order(**change).slots(0).sample, order().slots(0).sample)


def test_impossible_orders_are_errors() -> None:
    with pytest.raises(ValueError, match="at least one memory"):
        order(new=0, memories=[])
    with pytest.raises(ValueError, match="at least one sample"):
        order(memories=[3, 0])
    with pytest.raises(ValueError, match="replay"):
        order(replay=1.5)
