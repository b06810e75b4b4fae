"""How well a model keeps what it knew: AP and AP+ (elle.md, section 7)."""

from __future__ import annotations

from collections.abc import Mapping
from math import exp, log


def average_perplexity(ppl: Mapping[str, float]) -> float:
    """AP: exp of the mean over the seen domains of ln PPL. Lower is better."""
    return exp(sum(log(value) for value in ppl.values()) / len(ppl))


def average_increased_perplexity(
    now: Mapping[str, float], when_finished: Mapping[str, float], current: str
) -> float | None:
    """AP+: mean over the earlier domains of (PPL now - PPL when that domain was finished). Lower is better.

    Args:
        now: perplexity of every seen domain.
        when_finished: perplexity of each finished domain at the end of its own stage.
        current: the domain being learned, which does not count.

    Returns:
        ``None`` while there is no earlier domain.
    """
    earlier = [domain for domain in now if domain != current and domain in when_finished]
    if not earlier:
        return None
    return sum(now[domain] - when_finished[domain] for domain in earlier) / len(earlier)
