"""The plan of a whole stream: every stage's model under its layout, and what each rank holds, sends and computes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from elle_mp.config import Config
from elle_mp.models.flops import head_layers, training_flops_per_token
from elle_mp.models.spec import ModelSpec
from elle_mp.observe.planning.memory import Memory, rank_memory
from elle_mp.observe.planning.setting import Setting, stage_setting
from elle_mp.observe.planning.traffic import Traffic, rank_traffic


@dataclass(frozen=True)
class RankPlan:
    """What the ranks of one pipeline rank need.

    Attributes:
        layers: of each of its pipeline stages.
        flops: of a step on one of its ranks, recomputation included.
    """

    rank: int
    layers: tuple[int, ...]
    memory: Memory
    traffic: Traffic
    flops: float


@dataclass(frozen=True)
class StagePlan:
    """One stage of the stream.

    Attributes:
        flops: of a step over all ranks, forward and backward, recomputation left out.
        ranks: of every pipeline rank.
    """

    domain: str
    setting: Setting
    parameters: int
    flops: float
    ranks: tuple[RankPlan, ...]

    @property
    def heaviest(self) -> RankPlan:
        """The pipeline rank that needs the most memory."""
        return max(self.ranks, key=lambda item: item.memory.total)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        setting, spec = self.setting, self.setting.spec
        sizes = ("layers", "kv_groups", "queries", "head_dim", "embed", "mlp", "positions", "padded_vocab")
        return {
            "domain": self.domain,
            "model": {"family": spec.family} | {name: getattr(spec, name) for name in sizes},
            "layout": setting.parallel.model_dump(mode="json") | {"dp_replicate": setting.replicas},
            "ranks_used": setting.ranks,
            "batch": {"global": setting.batch, "micro": setting.micro, "micro_batches": setting.micro_batches},
            "parameters": self.parameters,
            "flops_per_step": self.flops,
            "heaviest": self.heaviest.rank,
            "pipeline_ranks": [
                {
                    "rank": item.rank,
                    "layers": list(item.layers),
                    "memory": asdict(item.memory) | {"waiting": list(item.memory.waiting), "total": item.memory.total},
                    "traffic": asdict(item.traffic) | {"total": item.traffic.total},
                    "flops_per_step": item.flops,
                }
                for item in self.ranks
            ],
        }


def plan_stream(config: Config, specs: list[ModelSpec], world_size: int, device: str) -> list[StagePlan]:
    """The plan of every stage of a stream that divides (:func:`elle_mp.config_layout.layout_problems`)."""
    domains = [stage.domain for stage in config.stream]
    return [
        plan_stage(domains[index], stage_setting(config, index, spec, world_size, device))
        for index, spec in enumerate(specs)
    ]


def plan_stage(domain: str, setting: Setting) -> StagePlan:
    """The plan of one stage."""
    spec = setting.spec
    return StagePlan(
        domain=domain,
        setting=setting,
        parameters=sum(prod(item.shape(spec.axes)) for item in setting.specs.values()),
        flops=training_flops_per_token(spec) * spec.positions * setting.batch,
        ranks=tuple(
            RankPlan(
                rank=rank,
                layers=tuple(setting.layers_of(stage) for stage in setting.stages_of(rank)),
                memory=rank_memory(setting, rank),
                traffic=rank_traffic(setting, rank),
                flops=_rank_flops(setting, rank),
            )
            for rank in range(setting.parallel.pp)
        ),
    )


def _rank_flops(setting: Setting, rank: int) -> float:
    """Operations of one rank in a step: its layers, and the head where it has it, of its share of the positions."""
    spec, stages = setting.spec, setting.stages_of(rank)
    head = head_layers(spec)
    layer = training_flops_per_token(spec) / (spec.layers + head)
    # Forward is a third; the MLP's share of a layer is that of its weights.
    again = {"none": 0.0, "selective": _mlp_share(spec) / 3, "full": 1 / 3}[setting.parallel.recompute]
    layers = sum(setting.layers_of(stage) for stage in stages) * (1 + again)
    if len(setting.parts) - 1 in stages:
        layers += head
    positions = spec.positions * setting.micro * setting.micro_batches / setting.cp
    return layer * layers * positions / setting.tp


def _mlp_share(spec: ModelSpec) -> float:
    mlp = (3 if spec.gated_mlp else 2) * spec.embed * spec.mlp
    per_layer = training_flops_per_token(spec) / 6 / (spec.layers + head_layers(spec))
    return mlp / per_layer
