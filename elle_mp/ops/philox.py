"""Philox4x32-10 (Salmon et al., SC'11): random bits that are a pure function of a key and a place.

A key is a digest of (seed, name), so what is drawn for a tensor depends on neither the layout nor the order in which
tensors are drawn. ``csrc/helpers/expand_draws.h`` has the same bits for the CPU.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def stream_key(seed: int, name: str) -> int:
    """The key of the stream ``(seed, name)``: the blake2b digest of ``seed/name``, 64 bits."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")


def random_bits(
    key: int, first_row: int, first_col: int, height: int, width: int, count: int = 16
) -> npt.NDArray[np.int64]:
    """``[height, width]``: 8 or 16 (``count``) bits of each entry."""
    each = 128 // count
    first = first_col // each
    block = np.arange(first, (first_col + width + each - 1) // each, dtype=np.uint64)[None, :]
    row = np.arange(first_row, first_row + height, dtype=np.uint64)[:, None]
    zero = np.zeros((height, block.shape[1]), dtype=np.uint64)
    words = np.stack(philox((block + zero, (row & _LOW) + zero, (row >> _HALF) + zero, zero), key), axis=-1)
    bits = words.astype("<u4").view(f"<u{count // 8}").reshape(height, -1)
    start = first_col - first * each
    return bits[:, start : start + width].astype(np.int64)


def philox(counter: tuple[Words, Words, Words, Words], key: int) -> tuple[Words, Words, Words, Words]:
    """Philox4x32-10: four 32-bit words, held in uint64, for each 128-bit counter (lowest word first)."""
    x0, x1, x2, x3 = counter
    for step in range(10):
        key0 = np.uint64((key + step * 0x9E3779B9) & 0xFFFFFFFF)
        key1 = np.uint64(((key >> 32) + step * 0xBB67AE85) & 0xFFFFFFFF)
        product0, product1 = x0 * np.uint64(0xD2511F53), x2 * np.uint64(0xCD9E8D57)
        x0, x1 = (product1 >> _HALF) ^ x1 ^ key0, product1 & _LOW
        x2, x3 = (product0 >> _HALF) ^ x3 ^ key1, product0 & _LOW
    return x0, x1, x2, x3


def signed(key: int) -> int:
    """The key as an op's number: the same 64 bits in two's complement."""
    return key - (1 << 64) if key >> 63 else key


def unsigned(number: int) -> int:
    """The key that :func:`signed` made."""
    return number & ((1 << 64) - 1)
