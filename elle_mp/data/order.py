"""Which sample stands where: the global order as a pure function of (seed, stage, phase, counts, step).

Nothing here depends on how many steps a phase has or on how many ranks there are, so a run can be longer, be
resumed, or change its layout, and every global batch stays what it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from elle_mp.data.hashing import GOLDEN, compiled_helpers, derive_key, mix64

ROUNDS = 8
MIN_BITS = 4
NEW_DOMAIN = -1


def permute(indices: NDArray[np.integer] | Sequence[int], n: int, key: int) -> NDArray[np.uint64]:
    """Sends ``indices`` through a keyed bijection of [0, n).

    A Feistel network on the next power of two, walked along its cycle until it falls below n (Black and
    Rogaway, "Ciphers with arbitrary finite domains", 2002): no table, so a permutation of 10^12 samples costs
    no memory.

    Args:
        indices: any shape, each in [0, n).
        n: the size of the set, in [1, 2**62).
        key: 64 bits.
    """
    wanted = np.asarray(indices, dtype=np.uint64)
    native = compiled_helpers()
    if native is not None:
        shuffled: NDArray[np.uint64] = native.permute(wanted, n, key)
        return shuffled
    return permute_numpy(wanted, n, key)


def permute_numpy(indices: NDArray[np.uint64], n: int, key: int) -> NDArray[np.uint64]:
    """:func:`permute` in NumPy, bit for bit what the extension gives."""
    if not 0 < n < 2**62:
        raise ValueError("n must lie in [1, 2**62)")
    if (indices >= n).any():
        raise ValueError("an index to permute is not below n")
    bits = max(MIN_BITS, (n - 1).bit_length())
    left_bits = bits // 2
    right_bits = bits - left_bits
    steps = np.arange(1, ROUNDS + 1, dtype=np.uint64) * GOLDEN
    keys = mix64(steps + np.uint64(key))
    out = indices.reshape(-1).copy()
    walking = np.arange(out.size)
    while walking.size:
        x = out[walking]
        left, right = x >> np.uint64(right_bits), x & np.uint64((1 << right_bits) - 1)
        for i in range(0, ROUNDS, 2):
            left = left ^ (mix64(right + keys[i]) >> np.uint64(64 - left_bits))
            right = right ^ (mix64(left + keys[i + 1]) >> np.uint64(64 - right_bits))
        x = (left << np.uint64(right_bits)) | right
        out[walking] = x
        walking = walking[x >= n]
    return out.reshape(indices.shape)


@dataclass(frozen=True)
class Slots:
    """What stands in each row of one global batch of B samples."""

    source: NDArray[np.int64]
    """[B] :data:`NEW_DOMAIN`, or the index of the earlier domain whose memory is replayed."""
    sample: NDArray[np.int64]
    """[B] the sample: of the new domain's training set, or of the memory."""
    serial: NDArray[np.int64]
    """[B] the number of this slot in the phase, counted from 0; no two slots of a phase share it."""


@dataclass(frozen=True)
class PhaseOrder:
    """The order of one phase of one stage.

    Every source (the new domain, each memory) is read epoch by epoch, each epoch in a permutation of its own,
    so no sample comes twice before all others came once. Replay takes floor((s+1)*batch*replay) -
    floor(s*batch*replay) rows of step s, evenly spread over the batch (and so over the ranks), and the
    earlier domains take turns.
    """

    seed: int
    stage: int
    phase: int
    new: int
    """Samples of the new domain's training set; 0 in a recovery phase, where every row is a replayed one."""
    memories: Sequence[int]
    """Samples in the memory of each earlier domain."""
    replay: float
    """Share of rows from the memories, in [0, 1); taken as the decimal fraction that it is written as."""
    batch: int
    """Rows of a global batch."""

    def __post_init__(self) -> None:
        if self.batch < 1 or self.new < 0 or not 0 <= self.replay <= 1:
            raise ValueError(f"needed: batch {self.batch} >= 1, new {self.new} >= 0, replay {self.replay} in [0, 1]")
        if any(count < 1 for count in self.memories):
            raise ValueError("every memory needs at least one sample")
        if self.new == 0 and not self.memories:
            raise ValueError("a phase without a new domain needs at least one memory")

    @property
    def share(self) -> Fraction:
        """The replayed share of the rows, exactly (to a millionth, so that the arithmetic stays within 64
        bits).
        """
        if not self.memories:
            return Fraction(0)
        if self.new == 0:
            return Fraction(1)
        return Fraction(repr(float(self.replay))).limit_denominator(10**6)

    def slots(self, step: int) -> Slots:
        """The rows of step ``step`` (counted from 0 in the phase)."""
        serial = np.arange(step * self.batch, (step + 1) * self.batch, dtype=np.int64)
        share = self.share
        before = serial * share.numerator // share.denominator
        replayed = (serial + 1) * share.numerator // share.denominator > before
        source = np.full(self.batch, NEW_DOMAIN, dtype=np.int64)
        sample = np.empty(self.batch, dtype=np.int64)
        sample[~replayed] = self._read(NEW_DOMAIN, self.new, (serial - before)[~replayed])
        if replayed.any():
            turns, domains = before[replayed], len(self.memories)
            first = derive_key("turn", self.seed, self.stage, self.phase) % domains
            source[replayed] = (turns + first) % domains
            for domain in np.unique(source[replayed]).tolist():
                rows = replayed & (source == domain)
                sample[rows] = self._read(domain, self.memories[domain], before[rows] // domains)
        return Slots(source, sample, serial)

    def _read(self, source: int, count: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples at ``positions`` [n], rising, of the endless reading of a source of ``count``."""
        out = np.empty(positions.shape, dtype=np.int64)
        if positions.size == 0:
            return out
        epochs, within = positions // count, positions % count
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            rows = epochs == epoch
            key = derive_key("order", self.seed, self.stage, self.phase, source, epoch)
            out[rows] = permute(within[rows], count, key).astype(np.int64)
        return out
