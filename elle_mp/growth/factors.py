"""What growth asks of the optimizer: a rate, an epsilon and an age for every entry of a parameter (growth.md, 1.3)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """Factors of one parameter, as products over its dimensions; global, small, on the CPU.

    With ``lr' = s lr``, ``eps' = r eps`` and ``wd' = wd / s`` growth commutes with every step of AdamW. ``s`` and ``r``
    are the products of ``rate`` and ``eps``. As ``wd'`` falls where ``lr'`` rises, the decay of a step stays ``lr wd``.

    Attributes:
        rate: per dimension fp64 ``[N_d]``, positive, or ``None`` for ones.
        eps: per dimension fp64 ``[N_d]``, positive, or ``None`` for ones.
        old: per dimension bool ``[N_d]``, or ``None`` for all true. An entry is old (it was there before the last
            growth) where all its dimensions say so.
        new: the whole parameter came with the last growth (an inserted layer): nothing of it is old.
    """

    rate: tuple[Tensor | None, ...]
    eps: tuple[Tensor | None, ...]
    old: tuple[Tensor | None, ...]
    new: bool = False


@dataclass(frozen=True)
class After:
    """What holds in one step after a growth.

    Attributes:
        freeze_old: old entries stay bitwise as they are: no Adam step, no weight decay, and their moments rest too
            (LLaMA-Pro, arXiv 2401.02415).
        new_factor: factor of the rate of the entries that are not old (SPARKLING, arXiv 2602.02472). It acts on their
            weight decay too, as the schedule's factor does.
    """

    freeze_old: bool = False
    new_factor: float = 1.0
