"""The declarations of a model's parameters, without the parameters."""

from __future__ import annotations

import torch

from elle_mp.axes import ParamSpec
from elle_mp.models.spec import ModelSpec
from elle_mp.models.transformer import Transformer
from elle_mp.parallel.mesh import Grid
from elle_mp.parallel.sharding import named_specs


def declarations(spec: ModelSpec) -> dict[str, ParamSpec]:
    """Every parameter of a model by name, in the order of the model."""
    return dict(named_specs(hollow_model(spec, torch.float32)))


def hollow_model(spec: ModelSpec, dtype: torch.dtype) -> Transformer:
    """The whole model on the meta device: no memory, no values, no process group."""
    with torch.device("meta"):
        return Transformer(spec, Grid(None, torch.device("cpu")), dtype)
