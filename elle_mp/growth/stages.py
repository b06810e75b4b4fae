"""The model of every stage of a stream, before any of it exists."""

from __future__ import annotations

from dataclasses import replace

from elle_mp.config import Config
from elle_mp.growth.plan import make_plan
from elle_mp.models.spec import ModelSpec


def stage_specs(config: Config, vocabulary: int) -> list[ModelSpec]:
    """The model of every stage, all growths planned.

    Args:
        vocabulary: ids of the tokenizer.

    Raises:
        UserError: a strategy cannot grow this family by these sizes.
    """
    spec = ModelSpec.from_config(config, vocabulary)
    specs, steps = [spec], 0
    for index, stage in enumerate(config.stream[1:], start=1):
        spec = make_plan(spec, config.stage_model(index), config.growth, config.run.seed).new
        specs.append(spec)
        steps = stage.recover.steps + stage.steps + (steps if stage.grow is None else 0)
        if config.growth.anneal and steps >= config.growth.anneal:
            spec = replace(spec, weighted_norms=False)
    return specs
