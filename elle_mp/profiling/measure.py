"""How a case is measured: compared first, then timed in turns, then watched by the memory profiler."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from elle_mp.profiling.entry import Case, Run
from elle_mp.profiling.machine import synchronise

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 4e-2, torch.float16: 1e-2}
"""Largest difference of two sides, relative to the largest entry."""


@dataclass(frozen=True)
class Times:
    """Seconds of one side: the median, and the quartiles as its spread."""

    median: float
    low: float
    high: float


REFERENCE = "reference"
LOOSER = 10.0
"""How many times the tolerance other peers than the reference may be away: some sum bf16 gradients over rows in bf16.
What is beyond the tolerance is told beside the times."""


class DifferenceError(Exception):
    """Two sides do not compute the same thing."""


def check_same(case: Case, backward: bool, dtype: torch.dtype) -> dict[str, float]:
    """Compares every peer's results with ours, within what ``dtype`` of the inputs allows.

    Returns:
        Of every peer the largest difference, relative to the largest entry of the result that it is in.

    Raises:
        DifferenceError: they differ in number, shape or value.
    """
    ours, found = case.ours(backward), {}
    for name, run in case.peers.items():
        theirs = run(backward)
        if len(ours) != len(theirs):
            raise DifferenceError(f"{name} gives {len(theirs)} results, ours {len(ours)}")
        allowed = TOLERANCE[dtype] * (1.0 if name == REFERENCE else LOOSER)
        found[name] = max((difference(*pair) for pair in zip(ours, theirs, strict=True)), default=0.0)
        if not found[name] <= allowed:
            raise DifferenceError(f"{name} differs by {found[name]:.2g} of the largest entry, allowed are {allowed:g}")
    return found


def difference(mine: Tensor, other: Tensor) -> float:
    """Largest difference over the largest entry of ``other``."""
    if mine.shape != other.shape:
        return float("inf")
    wide = other.detach().double()
    far = float((mine.detach().double() - wide).abs().max() / wide.abs().max().clamp_min(1e-30))
    return far if far == far else float("inf")


def time_in_turns(runs: Mapping[str, Run], backward: bool, seconds: float, device: torch.device) -> dict[str, Times]:
    """Times all sides one after the other, again and again; who goes first changes each time.

    Args:
        seconds: about how long; every side is timed at least three times.
    """
    taken: dict[str, list[float]] = {name: [] for name in runs}
    names, began_all = list(runs), time.perf_counter()
    rounds = 0
    while rounds < 4 or time.perf_counter() - began_all < seconds:
        for name in names[rounds % len(names) :] + names[: rounds % len(names)]:
            synchronise(device)
            began = time.perf_counter()
            runs[name](backward)
            synchronise(device)
            if rounds:  # the first round warms up
                taken[name].append(time.perf_counter() - began)
        rounds += 1
    return {name: spread(values) for name, values in taken.items()}


def spread(values: list[float]) -> Times:
    """Median and quartiles of at least two values."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Times(median, low, high)


def peak_memory(run: Run, backward: bool, device: torch.device) -> int:
    """Most bytes that one call had at once beyond its inputs, results included.

    On a GPU what torch's allocator counts; on a CPU the running sum of the allocations that torch's profiler reports:
    a kernel's own scratch memory, which does not come from torch, is in neither.
    """
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run(backward)
        synchronise(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        run(backward)
    return _highest(watched)


def _highest(watched: Any) -> int:
    """The highest running sum of a profile's allocations."""
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        highest = max(highest, total)
    return highest
