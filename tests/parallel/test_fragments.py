"""Runs of entries as boxes, against the entries' own indices."""

from __future__ import annotations

from math import prod

import torch
from hypothesis import given
from hypothesis import strategies as st

from elle_mp.parallel.fragments import Piece, boxes, pieces_of, take


@st.composite
def runs(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    start, stop = sorted(draw(st.tuples(*[st.integers(0, prod(shape))] * 2)))
    return shape, start, stop


@given(runs())
def test_boxes_are_the_run_in_order(run: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = run
    index = torch.arange(prod(shape)).view(shape)
    found = boxes(shape, start, stop)
    assert len(found) <= 2 * len(shape) - 1
    entries = [index[tuple(slice(*bound) for bound in box)].flatten() for box in found]
    assert torch.equal(torch.cat([*entries, torch.zeros(0, dtype=index.dtype)]), torch.arange(start, stop))
    assert all(entry.numel() for entry in entries)


@given(runs())
def test_pieces_are_views_at_their_places_in_the_whole(run: tuple[tuple[int, ...], int, int]) -> None:
    """The block lies behind another one along dimension 0, as a tensor-parallel rank's does."""
    shape, start, stop = run
    whole = torch.arange(2 * prod(shape)).view(2 * shape[0], *shape[1:])
    local = ((shape[0], 2 * shape[0]), *((0, size) for size in shape[1:]))
    flat = torch.zeros(stop - start, dtype=whole.dtype)
    pieces = pieces_of(flat, local, start)
    take(whole[shape[0] :], local, pieces)
    assert torch.equal(flat, prod(shape) + torch.arange(start, stop))
    for piece in pieces:
        assert isinstance(piece, Piece)
        assert torch.equal(piece.values, whole[tuple(slice(*bound) for bound in piece.bounds)])
