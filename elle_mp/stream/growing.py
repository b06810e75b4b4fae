"""One growth of the live model: measured before, applied, and proved after."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from elle_mp.config import OptimConfig
from elle_mp.data.batches import Batch
from elle_mp.errors import UserError
from elle_mp.growth.apply import Traffic
from elle_mp.growth.factors import Factors
from elle_mp.growth.plan import GrowthPlan
from elle_mp.growth.rates import factors_of
from elle_mp.models.build import Precision
from elle_mp.models.declarations import declarations
from elle_mp.models.flops import parameter_count
from elle_mp.models.pipeline import LanguageModel
from elle_mp.parallel.pipeline import Costs
from elle_mp.stream.evaluation import fixed_logits, largest_difference
from elle_mp.stream.growth_record import plan_record
from elle_mp.train.engine import grow_optimizer
from elle_mp.train.optimizer import ShardedAdamW

LARGEST_RELATIVE_DIFFERENCE = 1e-3
"""An exact plan that changes logits by more than this has a fault; fp32's rounding stays a hundred times below."""

Perplexities = Callable[[LanguageModel], dict[str, float]]


@dataclass(frozen=True)
class Before:
    """What the smaller model computed.

    Attributes:
        logits: this rank's part of those of the probe, ``[B, T, V_local]``.
        ppl: perplexity of every earlier domain.
        params: of the whole model.
    """

    logits: Tensor
    ppl: dict[str, float]
    params: int


@dataclass(frozen=True)
class Grown:
    """The larger model's optimizer (which has the model), and what making them took."""

    optimizer: ShardedAdamW
    traffic: Traffic
    seconds: float


def measure(optimizer: ShardedAdamW, precision: Precision, probe: Batch, perplexities: Perplexities) -> Before:
    """Logits on ``probe`` and perplexities, in the masters' precision."""
    checker = optimizer.checking_copy(precision)
    return Before(fixed_logits(checker, probe), perplexities(checker), parameter_count(checker.spec))


def left_by(lineage: Sequence[GrowthPlan]) -> dict[str, Factors] | None:
    """The rates that a model's growths have left, by parameter."""
    return factors_of(lineage, declarations) if lineage else None


def grow(
    plan: GrowthPlan,
    lineage: Sequence[GrowthPlan],
    optimizer: ShardedAdamW,
    optim: OptimConfig,
    precision: Precision,
    costs: Costs | None = None,
) -> Grown:
    """Applies a plan; the new optimizer has the next stage's settings.

    Args:
        lineage: every growth of the larger model; ``plan`` is its last one, unless it changes nothing.
        costs: as of :func:`elle_mp.train.engine.grow_optimizer`.
    """
    began = time.perf_counter()
    larger, traffic = grow_optimizer(plan, optimizer, precision, optim, left_by(lineage), costs)
    return Grown(larger, traffic, time.perf_counter() - began)


def prove(
    plan: GrowthPlan, before: Before, grown: Grown, precision: Precision, probe: Batch, perplexities: Perplexities
) -> dict[str, Any]:
    """The record of a growth: the plan, and logits and perplexities compared in the masters' precision.

    By now the smaller model may be gone: old, new and a copy of the new weights need never be held together.

    Raises:
        UserError: the plan said that it is exact, and the logits differ.
    """
    checker = grown.optimizer.checking_copy(precision)
    absolute, relative = largest_difference(before.logits, fixed_logits(checker, probe), checker)
    record = plan_record(plan, before.params, parameter_count(checker.spec)) | {
        "max_logit_diff": absolute,
        "max_logit_diff_rel": relative,
        "ppl_before": before.ppl,
        "ppl_after": perplexities(checker),
        "seconds": grown.seconds,
        "bytes_communicated": grown.traffic.received,
        "recut": grown.traffic.recut,
    }
    check_proof(record)
    return record


def check_proof(record: Mapping[str, Any]) -> None:
    """Stops when the measurement contradicts the plan.

    Raises:
        UserError: the plan said that it is exact, and the logits differ.
    """
    if record["exact"] and not record["max_logit_diff_rel"] < LARGEST_RELATIVE_DIFFERENCE:
        raise UserError(
            f"growth {record['width']}/{record['depth']} was planned exact but changed a logit by "
            f"{record['max_logit_diff']:.3g} ({record['max_logit_diff_rel']:.3g} of the largest); "
            "the checkpoint before it is intact: please report this"
        )
