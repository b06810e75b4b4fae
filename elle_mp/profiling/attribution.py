"""A recorded step as a sum of parts: every moment of the thread that runs it belongs to exactly one.

A moment belongs to the innermost event of that thread. A range of ours says its part; a node of the backward pass
belongs to the part whose forward operation has its sequence number; any other event to the one around it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from elle_mp.profiling.ranges import COLLECTIVES, PREFIX, STEP

REST = "rest"
NODE = "autograd::engine::evaluate_function: "
COLLECTIVE = ("gloo:", "nccl:", "c10d::", "_c10d_functional::")
Place = tuple[str, str]
"""A part and a pass: ``forward`` or ``backward``."""


@dataclass(frozen=True)
class Event:
    """What the profiler recorded; times in microseconds."""

    name: str
    start: float
    end: float
    thread: int
    sequence: int = -1
    in_flight: bool = False
    """Not the thread's own work: a collective under way."""


@dataclass(frozen=True)
class Breakdown:
    """Microseconds of every part and pass, which sum to those of the steps, and of collectives under way.

    Attributes:
        total: of the steps.
        in_flight: during which some collective was under way.
        hidden: of those, during which the thread did something else than wait for it.
    """

    parts: dict[Place, float]
    total: float
    in_flight: float
    hidden: float


def attribute(events: Iterable[Event]) -> Breakdown:
    """Splits the recorded steps.

    Raises:
        ValueError: no step was recorded.
    """
    everything = list(events)
    steps = [event for event in everything if event.name == PREFIX + STEP]
    if not steps:
        raise ValueError("no step was recorded")
    thread = steps[0].thread
    mine = [event for event in everything if event.thread == thread and not event.in_flight]
    mine.sort(key=lambda event: (event.start, -event.end))
    parts: dict[Place, float] = {}
    waits: list[tuple[float, float]] = []
    forward: dict[int, str] = {}
    stack: list[tuple[Event, Place, bool]] = []
    at = 0.0

    def spend(until: float) -> None:
        nonlocal at
        if stack and until > at:
            place = stack[-1][1]
            parts[place] = parts.get(place, 0.0) + until - at
            if place[0] == COLLECTIVES:
                waits.append((at, until))
        at = max(at, until)

    for event in mine:
        while stack and stack[-1][0].end <= event.start:
            spend(stack[-1][0].end)
            stack.pop()
        if not stack and event.name != PREFIX + STEP:
            continue
        spend(event.start)
        if not stack:
            at = event.start
        place, backward = _place(event, stack, forward)
        if event.sequence >= 0 and not event.name.startswith(NODE):
            forward[event.sequence] = place[0]
        stack.append((event, place, backward))
    while stack:
        spend(stack[-1][0].end)
        stack.pop()
    flights = _union([(event.start, event.end) for event in everything if event.in_flight], steps)
    under_way = sum(end - start for start, end in flights)
    waited = _overlap(flights, waits)
    return Breakdown(parts, sum(step.end - step.start for step in steps), under_way, under_way - waited)


def _place(event: Event, stack: Sequence[tuple[Event, Place, bool]], forward: dict[int, str]) -> tuple[Place, bool]:
    """The part and pass of an event inside of ``stack``, and whether the backward pass is running."""
    around, backward = (stack[-1][1], stack[-1][2]) if stack else ((REST, "forward"), False)
    if event.name.startswith(NODE):
        return (forward.get(event.sequence, REST), "backward"), True
    if event.name.startswith(COLLECTIVE):
        return (COLLECTIVES, around[1]), backward
    if event.name.startswith(PREFIX) and event.name != PREFIX + STEP:
        if around[0] == COLLECTIVES:
            return around, backward
        return (event.name.removeprefix(PREFIX), "backward" if backward else "forward"), backward
    return around, backward


def _union(spans: list[tuple[float, float]], steps: Sequence[Event]) -> list[tuple[float, float]]:
    """Disjoint spans that cover what ``spans`` cover of the steps."""
    cut = [(max(a, step.start), min(b, step.end)) for a, b in spans for step in steps]
    joined: list[tuple[float, float]] = []
    for start, end in sorted(span for span in cut if span[0] < span[1]):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _overlap(a: Sequence[tuple[float, float]], b: Sequence[tuple[float, float]]) -> float:
    """Length of what two lists of disjoint ascending spans have in common."""
    total, i, j = 0.0, 0, 0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] <= b[j][1]:
            i += 1
        else:
            j += 1
    return total
