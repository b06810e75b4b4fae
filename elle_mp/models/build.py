"""Makes a model of a spec on the shards of a grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from elle_mp.models.pipeline import LanguageModel, Pipeline, stage_parts
from elle_mp.models.spec import ModelSpec
from elle_mp.models.transformer import Transformer
from elle_mp.parallel.data_parallel import shard
from elle_mp.parallel.mesh import Grid
from elle_mp.parallel.pipeline import Part
from elle_mp.parallel.sharding import local_tensor


@dataclass(frozen=True)
class Precision:
    """The dtypes of a run: ``master`` parameters and moments, and ``compute`` for forward and backward."""

    master: torch.dtype
    compute: torch.dtype

    @classmethod
    def named(cls, name: str) -> Precision:
        """``bf16`` (fp32 masters), ``fp32`` or ``fp64``."""
        return {
            "bf16": cls(torch.float32, torch.bfloat16),
            "fp32": cls(torch.float32, torch.float32),
            "fp64": cls(torch.float64, torch.float64),
        }[name]

    @property
    def checking(self) -> Precision:
        """What growth is verified in: the masters' precision."""
        return Precision(self.master, self.master)


def empty_model(spec: ModelSpec, grid: Grid, precision: Precision, reshard: bool = True) -> LanguageModel:
    """A sharded model whose parameters have memory but no values yet; of a pipeline, this rank's stages."""
    if grid.pipeline_stages == 1:
        return empty_part(spec, grid, precision, reshard, None)
    parts = stage_parts(spec, grid)
    mine = [empty_part(spec, grid, precision, reshard, parts[stage]) for stage in grid.my_stages]
    return Pipeline(mine, precision.compute)


def empty_part(spec: ModelSpec, grid: Grid, precision: Precision, reshard: bool, part: Part | None) -> Transformer:
    """The same of one pipeline stage; ``None`` for all of the model."""
    with torch.device("meta"):
        model = Transformer(spec, grid, precision.master, part)
    compute = None if precision.compute == precision.master else precision.compute
    shard(model, model.layers.values(), grid, compute, reshard)
    model.to_empty(device=grid.device)
    if model.norm_stats is not None:
        model.norm_stats.fill_(1.0 / spec.embed)
    return model


@torch.no_grad()
def checking_copy(model: LanguageModel, precision: Precision) -> LanguageModel:
    """The same model computing in its masters' precision, on the same shards (one more copy of the parameters)."""
    copy = empty_model(model.spec, model.grid, precision.checking)
    for target, source in zip(copy.parameters(), model.parameters(), strict=True):
        local_tensor(target).copy_(local_tensor(source))
    for target_part, part in zip(copy.parts, model.parts, strict=True):
        if target_part.norm_stats is not None and part.norm_stats is not None:
            target_part.norm_stats.copy_(part.norm_stats)
    return copy.eval()
