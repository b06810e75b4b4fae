"""Learning rates after a growth (growth.md, section 4): pure functions of the steps since then."""

from __future__ import annotations

from elle_mp.growth.factors import After

PEAK_OF_COPIES = 1.3
"""Rate of the copies relative to that of the originals once it has risen (SPARKLING, arXiv 2602.02472)."""


def rewarm_factor(rate: str, since: int | None, rewarm_steps: int) -> float:
    """The factor of the schedule's rate, for all entries, ``since`` steps after the last growth.

    Under ``rewarm`` it rises linearly: ``1 / rewarm_steps`` in the first step (``since`` 0), as the schedule's warm-up
    does, and 1 from the last of ``rewarm_steps`` on. Otherwise, and without a growth (``None``), it is 1.
    """
    return _risen(since, rewarm_steps) if rate == "rewarm" else 1.0


def after_growth(rate: str, rewarm_steps: int, freeze_old: int, since: int | None) -> After:
    """What holds in the step that follows ``since`` steps after the last growth (``None``: the model never grew).

    Under ``asym_rewarm`` the rate of what is not old rises linearly from 0 to 1.3 times the current rate over
    ``rewarm_steps`` and stays there. Old entries rest in the first ``freeze_old`` steps.
    """
    if since is None:
        return After()
    new_factor = PEAK_OF_COPIES * _risen(since, rewarm_steps) if rate == "asym_rewarm" else 1.0
    return After(freeze_old=since < freeze_old, new_factor=new_factor)


def _risen(since: int | None, steps: int) -> float:
    return 1.0 if since is None else min(1.0, (since + 1) / max(steps, 1))
