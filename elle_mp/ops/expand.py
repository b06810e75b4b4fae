"""Growth of one matrix in one pass: rows and columns repeated, scaled, set apart by zero-sum noise; means; new values.

    out[i, j] = v + v * n[i, j],    v = source[rows[i], cols[j]] * (row_scale[i] * col_scale[j])

An index of :data:`MEAN` stands for the mean over the axis, and :class:`Fresh` says which entries are random instead.
One pass, because a large tensor does not stay in a cache until a second one.

The noise comes from Philox4x32-10 (Salmon et al., SC'11): the 8 bits ``u`` of entry (row, column) are number
``column % 16`` (low bits of a word before high ones) of the counter ``(column // 16, row mod 2^32, row // 2^32, 0)``,
so they depend on nothing but the key and the entry's place in the whole tensor. They are uniform, at a quarter of the
price of a word, and integers: over the ``c`` copies of a unit, ``c u - sum u`` is centred exactly. New values take 16
bits each.

Every step rounds to the type of the tensor in a fixed order, so that the compiled kernel (csrc/helpers/expand.cpp) and
the PyTorch path give the same bits, and a block the bits it has in the whole:

    scale = round(row_scale * col_scale in fp64);  v = source * scale
    n = round(c u - sum u) * round(strength / (c * NOISE_STD) in fp64);  out = v + (v * n)
    random values: round(2 u - 65535) * round(std / (2 FRESH_STD) in fp64)  (:class:`Fresh` says of which bits)

Means add by halves (:func:`sum_by_halves`), so their bits do not depend on how the other dimensions are cut.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from elle_mp.ops.library import cuda_ops
from elle_mp.ops.native import as_array, helpers
from elle_mp.ops.philox import random_bits, signed, unsigned

NOISE_STD = ((256**2 - 1) / 12) ** 0.5
"""Standard deviation of 8 uniform bits."""

FRESH_STD = ((65536**2 - 1) / 12) ** 0.5
"""Standard deviation of 16 uniform bits."""

TWICE_MEAN = 65535
"""Twice the mean of 16 uniform bits."""

MAX_COPIES = 1 << 15
"""Most copies of one unit: the centred integers stay below 2^31."""

MEAN = -1
"""An index that stands for the mean over the axis."""

KEPT, RANDOM, FORBIDDEN = 0, 1, 2
"""What a row or a column says of random values: nothing, that it wants them, that it must have none (which wins)."""

_TILE = 1 << 18
_SMALL = 1 << 14  # bytes that are not worth a piece of work of their own
_NATIVE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Index:
    """Where the entries of a block come from, and their scales. Made once for tensors that grow alike.

    Attributes:
        rows, cols: int64 ``[R']`` and ``[C']`` on the CPU, indices into the source, or :data:`MEAN`.
        row_scale, col_scale: fp64 ``[R']`` and ``[C']`` on the CPU, or ``None`` for ones; a one changes no bit.
    """

    rows: Tensor
    cols: Tensor
    row_scale: Tensor | None = None
    col_scale: Tensor | None = None

    def __post_init__(self) -> None:
        for name, indices, scale in (("row", self.rows, self.row_scale), ("col", self.cols, self.col_scale)):
            if indices.dtype != torch.int64 or indices.dim() != 1:
                raise ValueError("expand wants rows and cols int64 [R'] and [C']")
            if scale is not None and (scale.dtype != torch.float64 or scale.shape != indices.shape):
                size = indices.numel()
                raise ValueError(f"expand wants {name}_scale fp64 [{size}], got {scale.dtype} {tuple(scale.shape)}")

    @cached_property
    def shape(self) -> tuple[int, int]:
        """``(R', C')``."""
        return self.rows.numel(), self.cols.numel()

    @cached_property
    def arrays(self) -> tuple[npt.NDArray[np.generic] | None, ...]:
        """All four as contiguous arrays."""
        parts = (self.rows, self.cols, self.row_scale, self.col_scale)
        return tuple(None if part is None else _array(part) for part in parts)


@dataclass(frozen=True)
class Noise:
    """Noise that sums to zero over the copies of a unit.

    Attributes:
        key: 64-bit key of :func:`elle_mp.ops.philox.stream_key`.
        strength: standard deviation of the noise relative to each value, before centring: ``10 ** (-dB / 20)``.
        first_row, first_col: place of ``out[0, 0]`` in the whole tensor.
        groups: int64 ``[C']`` on the CPU; columns with the same number are the copies of one unit, and all of them are
            in this block. A column alone in its group gets no noise, and neither does a row that is a mean.
        alone: write the noise without the values that it is relative to.
    """

    key: int
    strength: float
    first_row: int
    first_col: int
    groups: Tensor
    alone: bool = False


@dataclass(frozen=True)
class Fresh:
    """Uniform values about zero of standard deviation ``std`` where a row or a column wants them.

    An entry's value depends on the key and its place in the whole tensor alone: its row, and its column where the row
    wants them, else the column's number among those of the whole tensor that want them. (Maps spread such columns: by
    their own numbers, most of what is drawn would be for columns that keep their values.)

    Attributes:
        key: of :func:`elle_mp.ops.philox.stream_key`.
        std: standard deviation.
        first_row, first_col: place of ``out[0, 0]`` in the whole tensor.
        rows, cols: uint8 ``[R']`` and ``[C']`` on the CPU: :data:`KEPT`, :data:`RANDOM`, or :data:`FORBIDDEN`.
        first_asked: how many columns of the whole tensor before ``first_col`` are :data:`RANDOM`.
    """

    key: int
    std: float
    first_row: int
    first_col: int
    rows: Tensor
    cols: Tensor
    first_asked: int = 0


class Expansions(AbstractContextManager["Expansions"]):
    """Growths that are made by other threads while the caller prepares the next ones, where the extension is built.

    On leaving, all are made. Until then, or :meth:`finish`, nobody may touch their tensors.
    """

    def __init__(self) -> None:
        self._native = helpers("ExpansionQueue")
        self._queue = None if self._native is None else self._native.ExpansionQueue(torch.get_num_threads())

    def take(self, source: Tensor, index: Index, out: Tensor, noise: Noise | None, fresh: Fresh | None) -> bool:
        """Whether a growth will be made here; else the caller has to."""
        if self._queue is None or out.device.type != "cpu":
            return False
        self._queue.push(_compiled(self._native, source, index, out, noise, fresh))
        return True

    def zero(self, out: Tensor) -> None:
        """Zeros for ``out``; small ones at once."""
        if (
            self._native is None
            or self._queue is None
            or out.device.type != "cpu"
            or out.nbytes < _SMALL
            or not out.is_contiguous()
        ):
            out.zero_()
        else:
            self._queue.push(self._native.zeros(as_array(out)))

    def finish(self) -> None:
        """Waits until all are made."""
        if self._queue is not None:
            self._queue.finish()

    def __exit__(self, *_: object) -> None:
        self.finish()


def expand(
    source: Tensor,
    index: Index,
    out: Tensor,
    noise: Noise | None = None,
    fresh: Fresh | None = None,
    later: Expansions | None = None,
) -> None:
    """Writes ``out[i, j] = source[rows[i], cols[j]] * row_scale[i] * col_scale[j]``, noise added, or a random value.

    Args:
        source: ``[R, C]`` fp32 or fp64, columns contiguous, rows at any distance; shares no memory with ``out``.
        index: ``rows``, ``cols`` and their scales.
        out: ``[R', C']`` of the type and device of ``source``, columns contiguous, rows at any distance.
        noise: set on one tensor of a growth: the weights, not their moments.
        fresh: which entries are random, if any.
        later: takes over the work, if it can; without it ``out`` is written on return.

    Raises:
        ValueError: shapes, types, strides or indices that do not fit, or noise and random values of different places.
    """
    _check(source, index, out)
    _check_drawn(noise, fresh, out)
    if later is not None and later.take(source, index, out, noise, fresh):
        return
    _OP(*_arguments(source, index, out, noise, fresh))


def _compiled(native: Any, source: Tensor, index: Index, out: Tensor, noise: Noise | None, fresh: Fresh | None) -> Any:
    """The extension's ``Expansion``."""
    place = noise or fresh
    draws = native.Draws(
        *((None, 0, 0.0, False) if noise is None else (_array(noise.groups), noise.key, noise.strength, noise.alone)),
        *(
            (None, None, 0, 0.0)
            if fresh is None
            else (*map(_array, (fresh.rows, fresh.cols)), fresh.key, fresh_factor(fresh))
        ),
        *((0, 0) if place is None else (place.first_row, place.first_col)),
        0 if fresh is None else fresh.first_asked,
    )
    return native.expansion(as_array(source), *index.arrays, as_array(out), draws, NOISE_STD)


def _arguments(source: Tensor, index: Index, out: Tensor, noise: Noise | None, fresh: Fresh | None) -> tuple[Any, ...]:
    """What :func:`write` takes: an op's numbers are signed."""
    place = noise or fresh
    return (
        *(source, index.rows, index.cols, index.row_scale, index.col_scale, out),
        *((None, 0, 0.0, False) if noise is None else (noise.groups, signed(noise.key), noise.strength, noise.alone)),
        *(
            (None, None, 0, 0.0, 0)
            if fresh is None
            else (fresh.rows, fresh.cols, signed(fresh.key), fresh.std, fresh.first_asked)
        ),
        *((0, 0) if place is None else (place.first_row, place.first_col)),
    )


def write(
    source: Tensor,
    rows: Tensor,
    cols: Tensor,
    row_scale: Tensor | None,
    col_scale: Tensor | None,
    out: Tensor,
    groups: Tensor | None,
    noise_key: int,
    strength: float,
    alone: bool,
    fresh_rows: Tensor | None,
    fresh_cols: Tensor | None,
    fresh_key: int,
    std: float,
    first_asked: int,
    first_row: int,
    first_col: int,
) -> None:
    """The op ``elle_mp::expand``: :func:`expand` with everything by itself. Nothing has a gradient."""
    index, place = Index(rows, cols, row_scale, col_scale), (first_row, first_col)
    noise = None if groups is None else Noise(unsigned(noise_key), strength, *place, groups, alone)
    fresh = None
    if fresh_rows is not None and fresh_cols is not None:
        fresh = Fresh(unsigned(fresh_key), std, *place, fresh_rows, fresh_cols, first_asked)
    native, cuda = helpers("Expansion"), cuda_ops("expand_block") if out.is_cuda else None
    if cuda is not None:
        from elle_mp.ops.expand_cuda import write_by_kernel  # which needs this module

        if write_by_kernel(cuda, source, index, out, noise, fresh):
            return
    if native is None or out.device.type != "cpu":
        _expand_torch(source, index, out, noise, fresh)
    else:
        _compiled(native, source, index, out, noise, fresh).run(torch.get_num_threads())


_OP = torch.library.custom_op("elle_mp::expand", write, mutates_args=("out",))


@_OP.register_fake
def _(source: Tensor, *others: Any) -> None:
    return None


def _array(values: Tensor) -> npt.NDArray[np.generic]:
    return as_array(values.contiguous())


def fresh_factor(fresh: Fresh) -> float:
    """What twice the bits, centred, are multiplied by."""
    return fresh.std / (2 * FRESH_STD)


def sum_by_halves(values: Tensor, dim: int) -> Tensor:
    """The sum along ``dim``, kept, by halves: the same additions however the other dimensions are cut."""
    size = values.shape[dim]
    if size == 1:
        return values
    total = values.narrow(dim, 0, size // 2) + values.narrow(dim, size // 2, size // 2)
    while True:
        if size % 2:
            total.narrow(dim, 0, 1).add_(values.narrow(dim, size - 1, 1))
        size, values = size // 2, total
        if size == 1:
            return total.narrow(dim, 0, 1)
        total.narrow(dim, 0, size // 2).add_(total.narrow(dim, size // 2, size // 2))


def noise_values(noise: Noise, shape: tuple[int, int], dtype: torch.dtype = torch.float64) -> Tensor:
    """What each entry of a block is multiplied by and added: ``n`` of the module's description.

    Args:
        shape: ``(R', C')`` of the block.
        dtype: fp32 or fp64, the type of the tensor that the noise is for.

    Returns:
        ``[R', C']`` on the CPU.
    """
    height, width = shape
    if noise.groups.shape != (width,):
        raise ValueError(f"expand wants a group for each of {width} columns, got {tuple(noise.groups.shape)}")
    if width == 0:
        return torch.empty(shape, dtype=dtype)
    _, group, count = np.unique(as_array(noise.groups), return_inverse=True, return_counts=True)
    if count.max() > MAX_COPIES:
        raise ValueError(f"expand makes noise for at most {MAX_COPIES} copies of a unit, got {count.max()}")
    order = np.argsort(group, kind="stable")
    begin = np.cumsum(count) - count
    drawn = random_bits(noise.key, noise.first_row, noise.first_col, height, width, 8)
    centred = drawn * count[group] - np.add.reduceat(drawn[:, order], begin, axis=1)[:, group]
    factor = torch.from_numpy(noise.strength / (count[group] * NOISE_STD)).to(dtype)
    return torch.from_numpy(centred).to(dtype) * factor


def _expand_torch(source: Tensor, index: Index, out: Tensor, noise: Noise | None, fresh: Fresh | None) -> None:
    """The same by PyTorch operations, a tile of rows at a time; equal bit for bit on the CPU."""
    height, width = out.shape
    if out.numel() == 0:
        return
    row_scale, col_scale, means = index.row_scale, index.col_scale, index.rows == MEAN
    source, row_index, column_index = with_means(source, index)
    column_index = column_index.to(out.device)
    step = max(1, _TILE // max(width, 1))
    for begin in range(0, height, step):
        tile = slice(begin, min(begin + step, height))
        value = source.index_select(0, row_index[tile].to(out.device)).index_select(1, column_index)
        if row_scale is not None or col_scale is not None:
            # Rounded on the CPU: not every device has fp64.
            scale = torch.ones((), dtype=torch.float64) if row_scale is None else row_scale[tile, None]
            scale = scale if col_scale is None else scale * col_scale
            value = value * scale.to(out.dtype).to(out.device)
        if noise is not None:
            shifted = replace(noise, first_row=noise.first_row + begin)
            added = value * noise_values(shifted, (value.shape[0], width), out.dtype).to(out.device)
            silent = torch.zeros_like(value) if noise.alone else value
            value = torch.where(means[tile, None].to(out.device), silent, added if noise.alone else value + added)
        if fresh is not None:
            value = _with_fresh(value, fresh, tile)
        out[tile] = value


def with_means(source: Tensor, index: Index) -> tuple[Tensor, Tensor, Tensor]:
    """``source`` with the means that are asked for behind it, and rows and columns that are all indices into it."""
    for indices, size in ((index.rows, source.shape[0]), (index.cols, source.shape[1])):
        if int(indices.min()) < MEAN or int(indices.max()) >= size:
            raise ValueError(f"expand wants indices from 0 to {size - 1}")
    for dim, indices in enumerate((index.rows, index.cols)):
        if bool((indices == MEAN).any()):
            source = torch.cat([source, sum_by_halves(source, dim) / source.shape[dim]], dim)
    rows, cols = (torch.where(i == MEAN, source.shape[dim] - 1, i) for dim, i in enumerate((index.rows, index.cols)))
    return source, rows, cols


def _with_fresh(value: Tensor, fresh: Fresh, tile: slice) -> Tensor:
    codes = torch.maximum(fresh.rows[tile, None], fresh.cols)
    height, width = codes.shape
    first_row = fresh.first_row + tile.start
    bits = np.zeros((height, width), dtype=np.int64)
    asked = as_array(fresh.cols) == RANDOM
    bits[:, asked] = random_bits(fresh.key, first_row, fresh.first_asked, height, int(asked.sum()))
    whole = as_array(fresh.rows[tile]) == RANDOM
    if whole.any():
        bits[whole] = random_bits(fresh.key, first_row, fresh.first_col, height, width)[whole]
    factor = torch.tensor(fresh_factor(fresh), dtype=torch.float64).to(value.dtype)
    drawn = torch.from_numpy(2 * bits - TWICE_MEAN).to(value.dtype) * factor
    return torch.where((codes == RANDOM).to(value.device), drawn.to(value.device), value)


def _check(source: Tensor, index: Index, out: Tensor) -> None:
    if source.dtype not in _NATIVE or source.dtype != out.dtype:
        raise ValueError(f"expand wants source and out both fp32 or both fp64, got {source.dtype}, {out.dtype}")
    if source.dim() != 2 or out.shape != index.shape:
        wanted = ", ".join(map(str, index.shape))
        raise ValueError(
            f"expand wants source [R, C] and out [{wanted}], got {tuple(source.shape)}, {tuple(out.shape)}"
        )
    for name, x in (("source", source), ("out", out)):
        if x.stride(1) != 1 and x.shape[1] > 1:
            raise ValueError(f"expand wants contiguous columns, got strides {x.stride()} of {name}")


def _check_drawn(noise: Noise | None, fresh: Fresh | None, out: Tensor) -> None:
    height, width = out.shape
    if noise is not None and (noise.groups.dtype != torch.int64 or noise.groups.shape != (width,)):
        raise ValueError(f"expand wants noise.groups int64 [{width}], got {tuple(noise.groups.shape)}")
    if fresh is None:
        return
    if (fresh.rows.shape, fresh.cols.shape) != ((height,), (width,)) or {fresh.rows.dtype, fresh.cols.dtype} != {
        torch.uint8
    }:
        raise ValueError(f"expand wants a uint8 code for each row and column of {tuple(out.shape)}")
    if noise is not None and (noise.first_row, noise.first_col) != (fresh.first_row, fresh.first_col):
        raise ValueError("expand wants noise and random values of the same place")
