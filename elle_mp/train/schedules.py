"""Learning-rate schedules: a factor of the peak rate, a pure function of the step."""

from __future__ import annotations

from math import cos, pi

from elle_mp.config import OptimConfig


def rate_factor(optim: OptimConfig, step: int, steps: int) -> float:
    """The factor of ``optim.lr`` at ``step`` (0-based) of ``steps``.

    The rate rises linearly over ``warmup * steps`` and then follows the schedule: ``linear`` and ``cosine`` to
    ``min_lr`` at the end, ``inverse_sqrt`` as ``sqrt(warm / step)``, ``wsd`` constant and then linear to ``min_lr``
    over the last ``decay_share`` of the steps, ``constant``.
    """
    warm = round(optim.warmup * steps)
    position = step + 1
    if position <= warm:
        return position / warm
    if optim.schedule == "constant":
        return 1.0
    if optim.schedule == "inverse_sqrt":
        return (max(warm, 1) / position) ** 0.5
    floor = optim.min_lr
    if optim.schedule == "wsd":
        first = steps - round(optim.decay_share * steps)
        share = max(0.0, (position - first) / max(steps - first, 1))
    else:
        share = (step - warm) / max(steps - warm, 1)
    share = min(share, 1.0)
    fall = 0.5 * (1 + cos(pi * share)) if optim.schedule == "cosine" else 1 - share
    return floor + (1 - floor) * fall
