"""Dropout whose masks are a pure function of (seed, site, sample, element): the same under every layout.

The generator is counter-based. SplitMix64 (Steele, Lea, Flood, OOPSLA'14) hashes seed, site, sample and row
to a 64-bit row key; a two-round multiply-xorshift mixer (constants of hash-prospector), into which
both halves of the row key enter, makes each 32-bit word of the row; each word serves two columns with 16 bits
each. So ``p`` is accurate to 2^-17, nothing is stored for the backward pass, and 32 columns cost a dozen
AVX-512 instructions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from elle_mp.ops.library import cuda_ops
from elle_mp.ops.native import as_array, helpers

GOLDEN = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio: SplitMix64's increment."""

LEVELS = 1 << 16
"""Number of levels a mask element is drawn from."""

_WORD = (1 << 64) - 1


@dataclass(frozen=True)
class DropoutKey:
    """What the masks of one place in the model depend on.

    Attributes:
        seed: any integer (taken modulo 2^64); :meth:`site` derives one for each place in the model.
        samples: int64 ``[B]``, the serial number of each sequence, on the CPU.
    """

    seed: int
    samples: Tensor

    def site(self, number: int) -> DropoutKey:
        """The key of place ``number``: its masks are independent of every other place's."""
        return replace(self, seed=_mix_int(self.seed + GOLDEN * (number + 1)))


def threshold(p: float) -> int:
    """Number of the 2^16 levels that are dropped.

    Raises:
        ValueError: ``p`` is not in [0, 1).
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout probability must be in [0, 1), got {p}")
    return min(round(p * LEVELS), LEVELS - 1)


def keep_scale(p: float) -> float:
    """What kept elements are multiplied by: 1 over the probability that the mask really has."""
    return LEVELS / (LEVELS - threshold(p))


def sample_keys(key: DropoutKey) -> Tensor:
    """int64 ``[B]``: a hash of (seed, sample) for each sequence."""
    seed = key.seed & _WORD
    signed = seed - (1 << 64) if seed >> 63 else seed
    return _mix(_mix(key.samples + _signed(GOLDEN)) ^ signed)


def keep_mask(keys: Tensor, first_row: int, rows: int, columns: int, p: float) -> Tensor:
    """The mask in plain PyTorch, on the device of ``keys``; the compiled kernels equal it bit for bit.

    Args:
        keys: int64 ``[B]`` of :func:`sample_keys`.
        first_row: number of the first row wanted.

    Returns:
        bool ``[B, rows, columns]``, true where the element is kept.
    """
    row = torch.arange(first_row + 1, first_row + rows + 1, dtype=torch.int64, device=keys.device)
    row_key = _mix(keys[:, None] + row * _signed(GOLDEN))
    low, high = row_key.to(torch.int32)[..., None], (row_key >> 32).to(torch.int32)[..., None]
    word = torch.arange((columns + 1) // 2, dtype=torch.int32, device=keys.device) + low
    word = (word ^ _shift32(word, 16)) * 0x21F0AAAD
    word = word ^ high
    word = (word ^ _shift32(word, 15)) * 0x735A2D97
    word = word ^ _shift32(word, 15)
    halves = torch.stack((word & 0xFFFF, _shift32(word, 16)), dim=-1)
    return halves.flatten(-2)[..., :columns] >= threshold(p)


def dropout(x: Tensor, p: float, key: DropoutKey, first_row: int | Sequence[int] = 0) -> Tensor:
    """Drops elements of ``x`` with probability ``p`` and scales the others by 1 / (1 - p).

    Args:
        x: ``[B, S, D]``, any strides.
        p: in [0, 1); at 0 ``x`` itself is returned.
        key: sequence ``b`` uses ``key.samples[b]``; element ``(s, d)`` of it has its own bits.
        first_row: position of ``x[:, 0]`` in the whole sequence, when the sequence is cut over ranks; several when
            ``x`` is as many equally long runs of positions, one behind the other.

    Raises:
        ValueError: ``p`` out of range, the key is for another number of sequences, or the runs do not divide ``S``.
    """
    if threshold(p) == 0:
        return x
    keys, row = run_keys(x, key, first_row)
    runs = x if len(keys) == len(x) else x.unflatten(1, (len(keys) // len(x), -1)).flatten(0, 1)
    out: Tensor = _Dropout.apply(runs, p, keys, row)
    return out.reshape(x.shape)


def run_keys(x: Tensor, key: DropoutKey, first_row: int | Sequence[int]) -> tuple[Tensor, int]:
    """Keys ``[B * runs]`` of the runs of positions that ``x [B, S, D]`` consists of, and the first row of each.

    Raises:
        ValueError: as of :func:`dropout`.
    """
    if x.dim() != 3 or key.samples.shape != (x.shape[0],):
        raise ValueError(f"dropout wants x [B, S, D] and B samples, got {tuple(x.shape)}, {tuple(key.samples.shape)}")
    keys = sample_keys(key)
    if isinstance(first_row, int):
        return keys, first_row
    if len(first_row) == 1:
        return keys, first_row[0]
    if x.shape[1] % len(first_row):
        raise ValueError(f"dropout: {x.shape[1]} positions are not {len(first_row)} equally long runs")
    # Rows enter a mask as key + GOLDEN * row: a run that starts at row r is one that starts at 0 under another key.
    starts = torch.tensor(first_row, dtype=torch.int64) * _signed(GOLDEN)
    return (keys[:, None] + starts).flatten(), 0


def apply_mask(x: Tensor, p: float, keys: Tensor, first_row: int) -> Tensor:
    """``x`` with its mask and scale applied; a new tensor, contiguous. No gradient."""
    native = helpers("dropout")
    if native is not None and x.device.type == "cpu" and x.dtype in _NATIVE:
        out = torch.empty(x.shape, dtype=x.dtype)
        native.dropout(
            as_array(x.contiguous()),
            as_array(out),
            as_array(keys),
            first_row,
            threshold(p),
            keep_scale(p),
            torch.get_num_threads(),
        )
        return out
    if x.is_cuda:
        ops = cuda_ops("dropout_rows")
        if ops is not None:
            masked: Tensor = ops.dropout_rows(x, keys.to(x.device), first_row, threshold(p))
            return masked
    keep = keep_mask(keys.to(x.device), first_row, x.shape[1], x.shape[2], p)
    # Multiplied in fp32 and rounded once, as the compiled kernel does.
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.where(keep, x.to(wide) * keep_scale(p), torch.zeros((), dtype=wide, device=x.device)).to(x.dtype)


_NATIVE = (torch.bfloat16, torch.float32, torch.float64)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, keys: Tensor, first_row: int) -> Tensor:
        ctx.save_for_backward(keys)
        ctx.p, ctx.first_row = p, first_row
        return apply_mask(x, p, keys, first_row)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (keys,) = ctx.saved_tensors
        return dropout_again(grad, ctx.p, keys, ctx.first_row), None, None, None


def dropout_again(grad: Tensor, p: float, keys: Tensor, first_row: int) -> Tensor:
    """The same mask on a gradient, itself differentiable (the map is linear)."""
    out: Tensor = _Dropout.apply(grad, p, keys, first_row)
    return out


def _mix_int(z: int) -> int:
    z &= _WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
    return z ^ (z >> 31)


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser on the bits of int64; products wrap."""
    z = (z ^ _shift64(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift64(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift64(z, 31)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _shift64(z: Tensor, by: int) -> Tensor:
    return (z >> by) & ((1 << (64 - by)) - 1)


def _shift32(z: Tensor, by: int) -> Tensor:
    return (z >> by) & ((1 << (32 - by)) - 1)
