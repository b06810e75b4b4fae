"""MLM masks: the published shares, keyed by sample, equal in C++ and NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from elle_mp.data.hashing import compiled_helpers
from elle_mp.data.masking import IGNORED, MlmMasking, mlm_mask

VOCAB, MASK, SPECIAL = 500, 4, (0, 1, 2, 3, 4, 250, 499)


def tokens_of(rows: int, length: int, seed: int = 0) -> np.ndarray:
    """Random ids, special ones among them."""
    return np.random.default_rng(seed).integers(0, VOCAB, size=(rows, length))


def test_shares_are_those_of_the_paper() -> None:
    tokens = tokens_of(2000, 256)
    inputs, targets = mlm_mask(tokens, np.arange(2000), 7, VOCAB, MASK, SPECIAL)
    special = np.isin(tokens, SPECIAL)
    predicted = targets != IGNORED
    places = (~special).sum()
    assert abs(predicted.sum() / places - 0.15) < 4 * np.sqrt(0.15 * 0.85 / places)
    count = predicted.sum()
    masked = (inputs == MASK) & predicted
    changed = predicted & ~masked & (inputs != tokens)
    assert abs(masked.sum() / count - 0.8) < 4 * np.sqrt(0.8 * 0.2 / count)
    # A random token is the old one once in as many times as there are ordinary tokens.
    expected = 0.1 * (1 - 1 / (VOCAB - len(SPECIAL)))
    assert abs(changed.sum() / count - expected) < 4 * np.sqrt(0.1 * 0.9 / count)
    drawn = np.bincount(inputs[changed], minlength=VOCAB)
    ordinary = np.delete(drawn, SPECIAL)
    assert (ordinary > 0).all() and drawn[list(SPECIAL)].sum() == 0
    assert ordinary.max() < 3 * ordinary.mean()
    by_place = predicted.sum(axis=0) / (~special).sum(axis=0)
    assert abs(by_place - 0.15).max() < 5 * np.sqrt(0.15 * 0.85 / 1900)


def test_targets_are_the_originals_and_the_rest_is_untouched() -> None:
    tokens = tokens_of(50, 64)
    inputs, targets = mlm_mask(tokens, np.arange(50), 1, VOCAB, MASK, SPECIAL)
    predicted = targets != IGNORED
    assert np.array_equal(targets[predicted], tokens[predicted])
    assert np.array_equal(inputs[~predicted], tokens[~predicted])
    assert not (predicted & np.isin(tokens, SPECIAL)).any()
    assert predicted.any(axis=1).all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (17, 129), (0, 8), (4, 0)])
def test_extension_equals_numpy(shape: tuple[int, int]) -> None:
    if compiled_helpers() is None:
        pytest.skip("the extension is not built")
    tokens = tokens_of(*shape, seed=5)
    keys = np.random.default_rng(1).integers(-(2**63), 2**63 - 1, size=shape[0])
    for rate in (0.15, 0.5, 0.001):
        masking = MlmMasking(11, VOCAB, MASK, SPECIAL, rate)
        for ours, theirs in zip(masking(tokens, keys), masking.numpy(tokens, keys), strict=True):
            assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
    wide = np.repeat(tokens, 2, axis=1)[:, ::2]  # a view that is not contiguous
    assert np.array_equal(masking(wide, keys)[0], masking.numpy(wide, keys)[0])


def test_every_sample_has_a_target_even_at_a_tiny_rate() -> None:
    tokens = np.full((300, 5), 9)
    tokens[:, ::2] = 1
    _, targets = mlm_mask(tokens, np.arange(300), 0, VOCAB, MASK, SPECIAL, rate=1e-6)
    assert ((targets != IGNORED).sum(axis=1) == 1).all()
    assert len(np.unique(np.argmax(targets != IGNORED, axis=1))) == 2
    only_special = np.ones((2, 5), dtype=np.int64)
    assert (mlm_mask(only_special, np.arange(2), 0, VOCAB, MASK, SPECIAL)[1] == IGNORED).all()


def test_a_mask_depends_on_seed_and_key_alone() -> None:
    tokens = tokens_of(20, 64)
    keys = np.arange(100, 120)
    masking = MlmMasking(3, VOCAB, MASK, SPECIAL)
    inputs, targets = masking(tokens, keys)
    order = np.random.default_rng(0).permutation(20)
    assert np.array_equal(masking(tokens[order], keys[order])[0], inputs[order])
    assert np.array_equal(masking(tokens[7:9], keys[7:9])[1], targets[7:9])
    assert not np.array_equal(masking(tokens, keys + 1)[1], targets)
    assert not np.array_equal(MlmMasking(4, VOCAB, MASK, SPECIAL)(tokens, keys)[1], targets)


def test_a_vocabulary_of_special_tokens_is_an_error() -> None:
    with pytest.raises(ValueError, match="every token is special"):
        MlmMasking(0, 3, 0, (1, 2))
