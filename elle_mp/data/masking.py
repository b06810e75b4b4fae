"""Dynamic masking for masked language models: 15 % of the places, of those 80 / 10 / 10 (BERT, arXiv
1810.04805).

Every decision is a hash of (seed, the sample's key, the position), so a mask does not depend on the batch,
the rank or the order in which samples are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from elle_mp.data.hashing import GOLDEN, SECOND, compiled_helpers, derive_key, mix64

IGNORED = -100
UNIT = 1 << 24


class MlmMasking:
    """The masking rule of one run.

    Args:
        seed: any integer.
        vocab_size: ids below it exist (without the padding of the embedding table).
        mask_id: the id of the mask token.
        special_ids: ids that are never masked and never put in as a random token; the mask's own is always
            one.
        rate: share of the places that are predicted. A sample in which none was drawn predicts one place all
            the same.
    """

    def __init__(
        self, seed: int, vocab_size: int, mask_id: int, special_ids: Sequence[int] = (), rate: float = 0.15
    ) -> None:
        if not 0 < rate < 1:
            raise ValueError(f"rate must lie between 0 and 1, not {rate}")
        self.mask_id = mask_id
        self._key = derive_key("mlm", seed)
        self._pick = round(rate * UNIT)
        self._masked = round(0.8 * UNIT)
        self._changed = round(0.9 * UNIT)
        self._special = np.zeros(vocab_size, dtype=np.uint8)
        self._special[list({mask_id, *special_ids})] = 1
        self._ordinary = np.flatnonzero(self._special == 0).astype(np.int64)
        if self._ordinary.size == 0:
            raise ValueError("every token is special: there is none to predict")

    def __call__(
        self, tokens: NDArray[np.int64], keys: NDArray[np.integer]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Masks ``tokens`` [n, T] by ``keys`` [n]; returns (inputs, targets) [n, T], targets -100 where not
        predicted.
        """
        native = compiled_helpers()
        if native is None:
            return self.numpy(tokens, keys)
        inputs, targets = native.mlm_mask(
            tokens,
            np.asarray(keys).astype(np.uint64),
            self._key,
            self._pick,
            self._masked,
            self._changed,
            self.mask_id,
            self._special,
            self._ordinary,
        )
        return inputs, targets

    def numpy(
        self, tokens: NDArray[np.int64], keys: NDArray[np.integer]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The same in NumPy, bit for bit."""
        length = tokens.shape[1]
        base = mix64(np.uint64(self._key) ^ mix64(np.asarray(keys).astype(np.uint64) + GOLDEN))
        places = np.arange(1, length + 1, dtype=np.uint64) * GOLDEN
        hashes = mix64(base[:, None] + places)
        known = (tokens >= 0) & (tokens < self._special.size)
        eligible = ~(known & (self._special[np.where(known, tokens, 0)] == 1))
        picked = eligible & ((hashes >> np.uint64(40)) < self._pick)
        for row in np.flatnonzero(~picked.any(axis=1) & eligible.any(axis=1)):
            candidates = np.flatnonzero(eligible[row])
            picked[row, candidates[np.argmin(hashes[row, candidates])]] = True
        second = mix64(hashes ^ SECOND)
        kind = second >> np.uint64(40)
        drawn = ((second & np.uint64(0xFFFFFFFF)) * np.uint64(self._ordinary.size)) >> np.uint64(32)
        inputs = np.where(picked & (kind < self._masked), self.mask_id, tokens)
        random_place = picked & (kind >= self._masked) & (kind < self._changed)
        inputs[random_place] = self._ordinary[drawn[random_place].astype(np.int64)]
        return inputs, np.where(picked, tokens, IGNORED)


def mlm_mask(
    tokens: NDArray[np.int64],
    keys: NDArray[np.integer],
    seed: int,
    vocab_size: int,
    mask_id: int,
    special_ids: Sequence[int] = (),
    rate: float = 0.15,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """One call of :class:`MlmMasking`: tokens [n, T], keys [n] -> (inputs, targets) [n, T]."""
    return MlmMasking(seed, vocab_size, mask_id, special_ids, rate)(tokens, keys)
