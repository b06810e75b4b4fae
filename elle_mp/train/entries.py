"""AdamW's step where the entries of one parameter have rates, epsilons or ages of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from math import prod

import torch
from torch import Tensor

from elle_mp.growth.apply import Moments
from elle_mp.growth.factors import After, Factors
from elle_mp.ops.random import Bounds

CPU_BLOCK = 1 << 18
"""Entries of a block of rows: its temporaries stay in the cache."""
ACCELERATOR_BLOCK = 1 << 26
"""The same on an accelerator: few launches, bounded memory."""

Pair = tuple[Tensor, Tensor]
"""A product over all dimensions: ``[N_0, .., 1]`` over all but the last, and ``[1, .., N]``; 1 where it broadcasts."""


class Age(Enum):
    """Whether entries were there before the last growth."""

    OLD = "old"
    NEW = "new"
    MIXED = "mixed"


@dataclass(frozen=True)
class ShardFactors:
    """The factors of one parameter, cut to this rank's shard.

    ``age`` and ``uniform`` are those of the whole parameter, so that all ranks update it in the same way.

    Attributes:
        age: of its entries.
        uniform: rate and epsilon are the same for all entries.
        rate, eps: the first entry's; everyone's when ``uniform``.
        rates, epsilons: the first of each pair fp64, the last in the shard's dtype.
        old: bool; both true where an entry is old.
    """

    age: Age
    uniform: bool
    rate: float
    eps: float
    rates: Pair
    epsilons: Pair
    old: Pair

    def by_entry(self, after: After) -> bool:
        """Whether this step treats entries differently."""
        return not self.uniform or self.by_age(after)

    def by_age(self, after: After) -> bool:
        """Whether this step treats old and new entries differently, and there are both."""
        return self.age is Age.MIXED and (after.freeze_old or after.new_factor != 1.0)

    def rests(self, after: After) -> bool:
        """Whether this step leaves the whole parameter alone."""
        return after.freeze_old and self.age is Age.OLD

    def factor(self, after: After) -> float:
        """The factor of the whole parameter's rate: that of new entries, if it has no others."""
        return after.new_factor if self.age is Age.NEW else 1.0


def shard_factors(factors: Factors | None, shape: Sequence[int], bounds: Bounds, like: Tensor) -> ShardFactors:
    """Cuts global factors to the block ``bounds`` of a parameter; ``None`` for ones, all old.

    Args:
        shape: of the whole parameter.
        like: this rank's shard.

    Raises:
        ValueError: a factor does not fit the parameter, or is not positive.
    """
    none = (None,) * len(shape)
    factors = factors or Factors(none, none, none)
    for values in (factors.rate, factors.eps, factors.old):
        found = [None if item is None else tuple(item.shape) for item in values]
        if len(found) != len(shape) or any(
            item not in (None, (size,)) for item, size in zip(found, shape, strict=True)
        ):
            raise ValueError(f"factors of shapes {found} for a parameter of shape {tuple(shape)}")
    scales = [item for item in (*factors.rate, *factors.eps) if item is not None]
    if not all(bool((item > 0).all()) for item in scales):
        raise ValueError("factors of rate and epsilon must be positive")
    return ShardFactors(
        age=_age(factors),
        uniform=all(bool((item == item[0]).all()) for item in scales),
        rate=prod(float(item[0]) for item in factors.rate if item is not None),
        eps=prod(float(item[0]) for item in factors.eps if item is not None),
        rates=_pair(factors.rate, bounds, torch.float64, like),
        epsilons=_pair(factors.eps, bounds, torch.float64, like),
        old=_pair([torch.zeros(size) for size in shape] if factors.new else factors.old, bounds, torch.bool, like),
    )


def _age(factors: Factors) -> Age:
    masks = [item for item in factors.old if item is not None]
    if factors.new or any(not bool(item.any()) for item in masks):
        return Age.NEW
    return Age.OLD if all(bool(item.all()) for item in masks) else Age.MIXED


def _pair(values: Sequence[Tensor | None], bounds: Bounds, dtype: torch.dtype, like: Tensor) -> Pair:
    """The product over dimensions of vectors cut to ``bounds``."""
    dims = len(bounds)
    cut = []
    for dim, (item, (start, stop)) in enumerate(zip(values, bounds, strict=True)):
        part = torch.ones(1, dtype=dtype) if item is None else item[start:stop].to(dtype)
        cut.append(part.view([-1 if index == dim else 1 for index in range(dims)]))
    first = torch.ones([1] * dims, dtype=dtype)
    for part in cut[:-1]:
        first = first * part
    last = cut[-1] if dtype == torch.bool else cut[-1].to(like.dtype)
    return first.to(like.device), last.to(like.device)


@dataclass(frozen=True)
class Settings:
    """Hyperparameters of one step, before any factor of the parameter."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    after: After


@torch.no_grad()
def step_by_entry(
    weight: Tensor, gradient: Tensor, moments: Moments, factors: ShardFactors, settings: Settings
) -> None:
    """One step of AdamW in place: ``p -= lr s mhat / (sqrt(vhat) + eps r)`` after ``p *= 1 - lr wd``.

    With all factors one it is torch's fused AdamW up to rounding. The step count is the parameter's: entries that
    rested while others moved find it advanced.
    """
    settings = replace(settings, lr=settings.lr * factors.factor(settings.after))
    beta1, beta2 = settings.betas
    moments.step += 1
    step = moments.step.double()
    # As tensors: reading the count would wait for the accelerator.
    root = (1 - torch.pow(beta2, step)).sqrt()
    # mhat / (sqrt(vhat) + eps r) = m root / (1 - beta1^t) / (sqrt(v) + eps r root): the corrections act on vectors.
    rate = factors.rates[0] * (settings.lr * root / (1 - torch.pow(beta1, step)))
    eps = factors.epsilons[0] * (settings.eps * root)
    by_age = factors.by_age(settings.after)
    for rows in _blocks(weight):
        block = _Block(weight[rows], gradient[rows], moments.first[rows], moments.second[rows])
        old = _rows(factors.old[0], rows) & _rows(factors.old[1], rows) if by_age else None
        rates = _rows(rate, rows).to(weight.dtype), _rows(factors.rates[1], rows)
        epsilons = _rows(eps, rows).to(weight.dtype), _rows(factors.epsilons[1], rows)
        if old is None or not settings.after.freeze_old:
            block.update(rates, epsilons, old, settings)
            continue
        before = [item.clone() for item in (block.weight, block.first, block.second)]
        block.update(rates, epsilons, old, settings)
        for item, kept in zip((block.weight, block.first, block.second), before, strict=True):
            torch.where(old, kept, item, out=item)


@dataclass(frozen=True)
class _Block:
    """Some rows of a shard; views, updated in place."""

    weight: Tensor
    gradient: Tensor
    first: Tensor
    second: Tensor

    def update(self, rates: Pair, epsilons: Pair, old: Tensor | None, settings: Settings) -> None:
        """Steps all entries; those that are not ``old`` at ``new_factor`` of the rate."""
        beta1, beta2 = settings.betas
        self.first.lerp_(self.gradient, 1 - beta1)
        self.second.mul_(beta2).addcmul_(self.gradient, self.gradient, value=1 - beta2)
        move = self.second.sqrt().addcmul_(*epsilons)
        torch.div(self.first, move, out=move)
        factor = settings.after.new_factor
        decay = settings.lr * settings.weight_decay
        if old is None or factor == 1.0:
            self.weight.mul_(1 - decay)
        else:
            move.mul_(_choose(old, 1.0, factor, move))
            self.weight.mul_(_choose(old, 1 - decay, 1 - factor * decay, move))
        if rates[0].numel() == 1:
            rates = torch.ones_like(rates[0]), rates[0] * rates[1]
        else:
            move.mul_(rates[0])
        self.weight.addcmul_(move, rates[1], value=-1)


def _choose(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """``yes`` where the condition holds, in the dtype of ``like`` (``torch.where`` on numbers makes fp32)."""
    return torch.where(condition, like.new_full((), yes), like.new_full((), no))


def _blocks(weight: Tensor) -> Iterator[slice]:
    """Rows of a shard, a block at a time; none of an empty shard."""
    if weight.numel() == 0:
        return
    rows = len(weight)
    block = CPU_BLOCK if weight.device.type == "cpu" else ACCELERATOR_BLOCK
    size = max(1, block * rows // weight.numel())
    for first in range(0, rows, size):
        yield slice(first, min(first + size, rows))


def _rows(values: Tensor, rows: slice) -> Tensor:
    return values if len(values) == 1 else values[rows]
