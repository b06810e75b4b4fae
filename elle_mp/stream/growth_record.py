"""What a growth's record holds before anything is measured."""

from __future__ import annotations

from math import prod
from typing import Any

from elle_mp.growth.plan import GrowthPlan
from elle_mp.models.declarations import declarations
from elle_mp.models.flops import training_flops_per_token
from elle_mp.models.spec import ModelSpec

UNMEASURED = ("max_logit_diff", "max_logit_diff_rel", "ppl_recovered")


def parameters_in(spec: ModelSpec) -> int:
    """Parameters of a model (the padded vocabulary's rows included)."""
    return sum(prod(item.shape(spec.axes)) for item in declarations(spec).values())


def plan_record(plan: GrowthPlan, params_before: int, params_after: int) -> dict[str, Any]:
    """The plan's summary with sizes and FLOPs, and room for what is measured."""
    record = plan.summary()
    for side, spec, params in (("from", plan.old, params_before), ("to", plan.new, params_after)):
        record[side] |= {"params": params, "flops_per_token": training_flops_per_token(spec)}
    return (
        record
        | dict.fromkeys(UNMEASURED)
        | {"ppl_before": {}, "ppl_after": {}, "seconds": 0.0, "bytes_communicated": 0, "recut": []}
    )
