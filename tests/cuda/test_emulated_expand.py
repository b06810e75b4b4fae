"""Growth by the CUDA kernel, on the emulator, bit for bit what the PyTorch path gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from elle_mp.ops import expand as module
from elle_mp.ops.expand import FORBIDDEN, KEPT, MEAN, RANDOM, Fresh, Index, Noise
from elle_mp.ops.expand_cuda import write_by_kernel
from elle_mp.ops.philox import stream_key

SHAPES = [((3, 4), (5, 7)), ((1, 1), (1, 1)), ((9, 40), (13, 300)), ((6, 17), (6, 33))]


def both(emulated: Any, source: Tensor, index: Index, noise: Noise | None, fresh: Fresh | None) -> tuple[Tensor, ...]:
    """What the kernel and what PyTorch write, into rows that are apart."""
    outs = [torch.full((index.shape[0], index.shape[1] + 3), 7.0, dtype=source.dtype) for _ in range(2)]
    views = [out[:, 1 : 1 + index.shape[1]] for out in outs]
    assert write_by_kernel(emulated, source, index, views[0], noise, fresh)
    module._expand_torch(source, index, views[1], noise, fresh)
    return tuple(outs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("scaled", ["none", "rows", "cols", "both"])
@pytest.mark.parametrize("drawn", ["nothing", "noise", "alone", "fresh", "noise and fresh"])
def test_every_bit_is_the_references(
    emulated: Any, sizes: tuple[tuple[int, int], tuple[int, int]], scaled: str, drawn: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(2)
    (old_rows, old_cols), (rows, cols) = sizes
    source = torch.randn(old_rows, old_cols + 2, dtype=dtype)[:, 1 : 1 + old_cols]
    row_map, col_map = torch.arange(rows) * old_rows // rows, torch.randint(0, old_cols, (cols,))
    row_scale = torch.rand(rows, dtype=torch.float64) + 0.5 if scaled in ("rows", "both") else None
    col_scale = torch.rand(cols, dtype=torch.float64) + 0.5 if scaled in ("cols", "both") else None
    noise = fresh = None
    if drawn != "fresh" and drawn != "nothing":
        noise = Noise(stream_key(1, "a"), 0.1, (1 << 33) + 5, 21, col_map, drawn == "alone")
    if "fresh" in drawn:
        codes = torch.tensor([KEPT, KEPT, RANDOM, FORBIDDEN], dtype=torch.uint8)
        picks = (codes[torch.randint(0, 4, (n,))] for n in (rows, cols))
        fresh = Fresh(stream_key(2, "b"), 0.02, (1 << 33) + 5, 21, *picks, first_asked=11)
    found, wanted = both(emulated, source, Index(row_map, col_map, row_scale, col_scale), noise, fresh)
    assert torch.equal(found, wanted)


def test_means_and_their_silence(emulated: Any, order: str) -> None:
    source = torch.randn(5, 6)
    rows, cols = torch.tensor([0, MEAN, 4, 1]), torch.tensor([MEAN, 3, 3, 0, 5])
    noise = Noise(9, 0.3, 0, 0, torch.tensor([0, 1, 1, 2, 3]))
    for alone in (False, True):
        chosen = Noise(9, 0.3, 0, 0, noise.groups, alone)
        found, wanted = both(emulated, source, Index(rows, cols), chosen, None)
        assert torch.equal(found, wanted)


def test_one_unit_in_many_copies(emulated: Any, order: str) -> None:
    source, width = torch.randn(2, 3), 1500
    index = Index(torch.tensor([1, 0, 1, 1, 0]), torch.zeros(width, dtype=torch.int64))
    noise = Noise(5, 0.1, 3, 4, torch.zeros(width, dtype=torch.int64))
    found, wanted = both(emulated, source, index, noise, None)
    assert torch.equal(found, wanted)


def test_more_columns_than_a_block_has_memory_for_are_left_to_pytorch(emulated: Any) -> None:
    width = 60_000
    index = Index(torch.zeros(1, dtype=torch.int64), torch.zeros(width, dtype=torch.int64))
    out, noise = torch.empty(1, width), Noise(5, 0.1, 0, 0, torch.arange(width))
    assert not write_by_kernel(emulated, torch.randn(1, 1), index, out, noise, None)
