"""One growth of the live model: plan, apply, and proof."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from elle_mp.config import OptimConfig
from elle_mp.data.batches import Batch
from elle_mp.errors import UserError
from elle_mp.growth.apply import Traffic, grow_on_shards
from elle_mp.growth.plan import GrowthPlan
from elle_mp.models.build import Precision, checking_copy, empty_model
from elle_mp.models.flops import parameter_count
from elle_mp.models.transformer import Transformer
from elle_mp.stream.evaluation import fixed_logits, largest_difference
from elle_mp.train.optimizer import ShardedAdamW

LARGEST_RELATIVE_DIFFERENCE = 1e-3
"""An exact plan that changes logits by more than this has a fault; fp32's rounding stays a hundred times below."""

Perplexities = Callable[[Transformer], dict[str, float]]


@dataclass(frozen=True)
class Grown:
    """What a growth leaves: the larger model, its optimizer, and the record of it."""

    model: Transformer
    optimizer: ShardedAdamW
    record: dict[str, Any]


def grow(
    plan: GrowthPlan,
    model: Transformer,
    optimizer: ShardedAdamW,
    optim: OptimConfig,
    precision: Precision,
    reshard: bool,
) -> tuple[Transformer, ShardedAdamW, Traffic]:
    """The larger model and its optimizer (with the next stage's settings), and what growing it sent."""
    larger = empty_model(plan.new, model.grid, precision, reshard)
    larger_optimizer = ShardedAdamW(larger, optim)
    traffic = grow_on_shards(plan, model, larger, optimizer.moments, larger_optimizer.moments)
    return larger, larger_optimizer, traffic


def grow_and_prove(
    plan: GrowthPlan,
    model: Transformer,
    optimizer: ShardedAdamW,
    optim: OptimConfig,
    precision: Precision,
    reshard: bool,
    probe: Batch,
    perplexities: Perplexities,
) -> Grown:
    """Grows, and compares logits on ``probe`` and perplexities before and after in the masters' precision.

    Raises:
        UserError: the plan said that it is exact, and the logits differ.
    """
    checker = checking_copy(model, precision)
    logits, ppl_before = fixed_logits(checker, probe), perplexities(checker)
    del checker
    began = time.perf_counter()
    larger, larger_optimizer, traffic = grow(plan, model, optimizer, optim, precision, reshard)
    seconds = time.perf_counter() - began
    checker = checking_copy(larger, precision)
    absolute, relative = largest_difference(logits, fixed_logits(checker, probe), larger)
    ppl_after = perplexities(checker)
    if plan.exact and not relative < LARGEST_RELATIVE_DIFFERENCE:
        raise UserError(
            f"growth {plan.width}/{plan.depth} was planned exact but changed a logit by {absolute:.3g} "
            f"({relative:.3g} of the largest); the checkpoint before it is intact: please report this"
        )
    record = plan.summary()
    record["from"]["params"], record["to"]["params"] = parameter_count(model), parameter_count(larger)
    record |= {
        "max_logit_diff": absolute,
        "max_logit_diff_rel": relative,
        "ppl_before": ppl_before,
        "ppl_after": ppl_after,
        "ppl_recovered": None,
        "seconds": seconds,
        "bytes_communicated": traffic.received,
        "recut": traffic.recut,
    }
    return Grown(larger, larger_optimizer, record)
