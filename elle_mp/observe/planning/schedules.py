"""How many micro-batches wait for their backward pass, by the order of each pipeline schedule."""

from __future__ import annotations

from collections.abc import Iterator

from elle_mp.observe.planning.setting import Setting

Event = tuple[int, int]
"""A stage of the rank, by its number on it, and +1 for a forward pass or -1 when its activations are freed."""


def most_kept(setting: Setting, rank: int, bytes_of: list[int]) -> tuple[int, tuple[int, ...]]:
    """The largest sum of activations that a pipeline rank keeps in a step.

    Args:
        rank: pipeline rank.
        bytes_of: of one micro-batch in each of the rank's stages, in order.

    Returns:
        The bytes, and how many micro-batches of each stage they are.
    """
    counts = [0] * len(bytes_of)
    best, at = 0, tuple(counts)
    for stage, change in _events(setting, rank):
        counts[stage] += change
        kept = sum(count * size for count, size in zip(counts, bytes_of, strict=True))
        if kept > best:
            best, at = kept, tuple(counts)
    return best, at


def _events(setting: Setting, rank: int) -> Iterator[Event]:
    ranks, count = setting.parallel.pp, setting.micro_batches
    if ranks == 1:
        yield from [(0, 1), (0, -1)]
        return
    name = setting.parallel.schedule
    if name == "gpipe":
        yield from [(0, 1)] * count + [(0, -1)] * count
    elif name == "1f1b":
        yield from _one_forward_one_backward(ranks - rank, count)
    elif name == "zbv":
        yield from _v_shaped(ranks, rank, count)
    else:
        yield from _interleaved(setting, rank, zero_bubble=name == "zero_bubble")


def _one_forward_one_backward(most: int, count: int) -> Iterator[Event]:
    warm = min(most, count)
    yield from [(0, 1)] * warm
    for _ in range(count - warm):
        yield (0, -1)
        yield (0, 1)
    yield from [(0, -1)] * warm


def _interleaved(setting: Setting, rank: int, zero_bubble: bool) -> Iterator[Event]:
    """Rounds of micro-batches through one stage after the other (Narayanan et al., arXiv 2104.04473, section 2.2).

    With zero bubble the gradients of the weights, which free the activations, lag ``rank`` passes behind.
    """
    ranks, count, stages = setting.parallel.pp, setting.micro_batches, setting.parallel.stages_per_rank
    a_round = count // max(1, count // ranks)
    total = count * stages
    warm = min((stages - 1) * a_round + (1 if zero_bubble else 2) * (ranks - 1 - rank), total)
    lag = rank if zero_bubble else 0
    done: list[int] = []
    for step in range(total + warm):
        if step < total:
            yield (step // a_round % stages, 1)
        if step >= warm:
            done.append(stages - 1 - (step - warm) // a_round % stages)
            if len(done) > lag:
                yield (done[len(done) - 1 - lag], -1)
    yield from ((stage, -1) for stage in done[len(done) - lag :] if lag)


def _v_shaped(ranks: int, rank: int, count: int) -> Iterator[Event]:
    """ZBV (Qi et al., arXiv 2401.10241, section 6) in torch's order: made for at least ``2 ranks - 1`` micro-batches,
    of which those that there are not are left out."""
    seen = dict.fromkeys([(0, 1), (0, -1), (1, 1), (1, -1)], 0)
    for event in _v_shaped_whole(ranks, rank, max(2 * ranks - 1, count)):
        if seen[event] < count:
            yield event
        seen[event] += 1


def _v_shaped_whole(ranks: int, rank: int, count: int) -> Iterator[Event]:
    down = 2 * (ranks - rank) - 1
    yield from [(0, 1)] * down
    yield from [(1, 1), (0, 1)] * rank
    yield from [(1, 1), (1, -1)] * (ranks - rank)
    down, up = down + rank, ranks
    while up < down or down < count:
        if down < count:
            yield (0, 1)
            down += 1
        yield from [(0, -1), (1, 1), (1, -1)]
        up += 1
    yield from [(0, -1)] * count  # the cool-down only frees
