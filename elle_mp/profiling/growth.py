"""What growth and initialisation do: a matrix expanded in one pass, normal numbers by (seed, name, index)."""

from __future__ import annotations

import torch
from torch import Tensor

from elle_mp.ops.expand import Index, Noise, expand
from elle_mp.ops.random import normal_block
from elle_mp.profiling.entry import Case, Entry, Run, normal, seeded

STRENGTH = 0.1


def plain(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Case:
    """``[R, C]`` to ``[2 R, 2 C]``, rows and columns repeated and scaled."""
    return _case(shape, dtype, device, False)


def noisy(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Case:
    """The same with zero-sum noise added. Only its yardstick is timed: the tests of the op compare the bits."""
    return _case(shape, dtype, device, True)


def _case(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, noisy: bool) -> Case:
    height, width = shape
    source = normal(seeded(), shape, dtype, device)
    rows, cols = torch.arange(2 * height) % height, torch.arange(2 * width) % width
    index = Index(rows, cols, None, torch.full((2 * width,), 0.5, dtype=torch.float64))
    noise = Noise(1, STRENGTH, 0, 0, cols) if noisy else None
    out, other = (torch.empty(2 * height, 2 * width, dtype=dtype, device=device) for _ in range(2))
    there_rows, there_cols = rows.to(device), cols.to(device)

    def ours(_: bool) -> tuple[Tensor, ...]:
        expand(source, index, out, noise)
        return (out,)

    def gathered(_: bool) -> tuple[Tensor, ...]:
        return (source.index_select(0, there_rows).index_select(1, there_cols).mul_(0.5),)

    peers: dict[str, Run] = {} if noisy else {"index_select": gathered}
    read, written = (float(x.numel() * x.element_size()) for x in (source, out))
    moved = read + written
    return Case(ours, peers, (moved, moved), yardsticks={"copy_ of the result": lambda _: (other.copy_(out),)})


def numbers(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Case:
    """A matrix of normal numbers; torch's are others, so it is a yardstick."""
    bounds = tuple((0, size) for size in shape)
    out = torch.empty(shape, dtype=dtype, device=device)
    size = float(out.numel() * out.element_size())
    return Case(
        lambda _: (normal_block(1, "profile", shape, bounds, dtype),),
        {},
        (size, size),
        yardsticks={"Tensor.normal_": lambda _: (out.normal_(),)},
    )


SHAPES = ((256, 256), (512, 512), (2048, 2048))
DIMS = "RxC: rows and columns"
ENTRIES = (
    Entry("expand", DIMS + " before", SHAPES, plain, ("float32",), backward=False),
    Entry("expand_noise", DIMS + " before", SHAPES, noisy, ("float32",), backward=False),
    Entry("philox_normal", DIMS, SHAPES, numbers, ("float32",), backward=False),
)
