"""One stage of a stream under one layout: what the formulas of planning read."""

from __future__ import annotations

from dataclasses import dataclass

from elle_mp.axes import ParamSpec
from elle_mp.config import Config, ParallelConfig
from elle_mp.config_layout import data_parallel_replicas
from elle_mp.models.declarations import declarations
from elle_mp.models.flops import head_layers
from elle_mp.models.spec import ModelSpec
from elle_mp.parallel.pipeline import Part, balanced, parts_of

WIDTHS = {"bf16": (4, 2), "fp32": (4, 4), "fp64": (8, 8)}
"""Bytes of a number in the masters and in the computation, by ``precision``."""


@dataclass(frozen=True)
class Setting:
    """A model, its layout and its batch.

    Attributes:
        specs: every parameter of the whole model, by name.
        parts: what each pipeline stage holds.
        replicas: ``parallel.dp_replicate``, ``auto`` resolved.
        micro: sequences of a micro-batch on a rank.
        micro_batches: of a step.
        batch: sequences of a step over all ranks.
        master, compute: bytes of a number in the masters and in the computation.
        device: ``cpu`` or ``cuda``: attention keeps other tensors.
    """

    spec: ModelSpec
    specs: dict[str, ParamSpec]
    parts: tuple[Part, ...]
    parallel: ParallelConfig
    replicas: int
    micro: int
    micro_batches: int
    batch: int
    master: int
    compute: int
    device: str = "cuda"

    @property
    def tp(self) -> int:
        """Tensor-parallel ranks."""
        return self.parallel.tp

    @property
    def cp(self) -> int:
        """Context-parallel ranks."""
        return self.parallel.cp

    @property
    def shard(self) -> int:
        """Ranks that share the parameters."""
        return self.parallel.dp_shard * self.parallel.cp

    @property
    def ranks(self) -> int:
        """Of the whole layout."""
        return self.parallel.pp * self.replicas * self.shard * self.tp

    @property
    def positions(self) -> int:
        """Positions of one micro-batch on a rank inside attention and MLP, where heads and units are cut."""
        return self.micro * self.spec.positions // self.cp

    @property
    def positions_between(self) -> int:
        """Positions of one micro-batch on a rank between sub-layers: fewer under sequence parallelism."""
        return self.positions // (self.tp if self.parallel.sequence_parallel else 1)

    @property
    def predicted(self) -> int:
        """Most positions of one micro-batch whose loss a rank computes."""
        return self.micro * self.spec.text_length // self.cp

    @property
    def statistics(self) -> int:
        """Bytes of a statistic (a norm's, a softmax's), which is never bf16."""
        return max(self.compute, 4)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The pipeline stages of a pipeline rank, in order (as :attr:`elle_mp.parallel.mesh.Grid.my_stages`)."""
        return tuple(stage for stage in range(len(self.parts)) if self.rank_of_stage(stage) == rank)

    def rank_of_stage(self, stage: int) -> int:
        """The pipeline rank that holds a stage."""
        return self.parallel.rank_of_stage(stage)

    def layers_of(self, stage: int) -> int:
        """Number of layers of a pipeline stage."""
        return len(self.parts[stage].layers)


def make_setting(
    spec: ModelSpec,
    parallel: ParallelConfig,
    *,
    replicas: int,
    batch: int,
    micro: int,
    precision: str,
    device: str = "cuda",
) -> Setting:
    """The setting of a layout that divides (:func:`elle_mp.config_layout.layout_problems` says whether).

    Args:
        batch: sequences of a step over all ranks.
        micro: most sequences of a rank at a time.
        precision: as in the configuration.
    """
    local = batch // (replicas * parallel.dp_shard)
    stages = parallel.pp * parallel.stages_per_rank
    split = parallel.split
    sizes = balanced(spec.layers, stages, 0.0, head_layers(spec)) if isinstance(split, str) else split
    master, compute = WIDTHS[precision]
    return Setting(
        spec=spec,
        specs=declarations(spec),
        parts=parts_of(sizes),
        parallel=parallel,
        replicas=replicas,
        micro=min(micro, local),
        micro_batches=max(local // micro, 1),
        batch=batch,
        master=master,
        compute=compute,
        device=device,
    )


def stage_setting(config: Config, stage: int, spec: ModelSpec, world_size: int, device: str) -> Setting:
    """The setting of one stage of a stream whose model has the given spec by then."""
    parallel = config.stage_parallel(stage)
    batch = config.stage_batch(stage)
    return make_setting(
        spec,
        parallel,
        replicas=data_parallel_replicas(parallel, world_size),
        batch=batch.global_,
        micro=batch.micro,
        precision=config.precision,
        device=device,
    )
