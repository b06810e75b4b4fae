"""FSDP2 over the data-parallel axes: sharded fp32 masters, computation in bf16."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from elle_mp.parallel.mesh import Grid


def shard(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    grid: Grid,
    compute_dtype: torch.dtype | None,
    reshard: bool,
) -> None:
    """Shards ``blocks``, then what is left of ``model``, over the data-parallel mesh axes, in place.

    Args:
        compute_dtype: parameters are gathered in it; ``None`` for that of the masters. Gradients are reduced in
            the masters' precision.
        reshard: free a block's gathered parameters after its forward pass.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype,
        reduce_dtype=None if compute_dtype is None else torch.float32,
        cast_forward_inputs=False,
    )
    # A rank that holds everything has nothing to free: gathering again would only copy.
    # Zero-bubble schedules take the gradients of weights later, by the parameters that are in place then: the gathered
    # ones have to stay there.
    split_backward = grid.size("pp") > 1 and grid.parallel.schedule in ("zero_bubble", "zbv")
    reshard = reshard and grid.size("shard") > 1 and not split_backward
    for block in blocks:
        fully_shard(block, mesh=grid.fsdp_mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=grid.fsdp_mesh, mp_policy=policy, reshard_after_forward=False)


def synchronise_gradients(model: nn.Module, enabled: bool) -> None:
    """Whether the next backward reduces gradients: only the last micro-batch of a step has to."""
    if not isinstance(model, FSDPModule):
        raise TypeError("the model is not sharded; call shard() first")
    model.set_requires_gradient_sync(enabled)


def release(model: nn.Module) -> None:
    """Frees gathered parameters: after it the model's parameters are the sharded masters again.

    A backward pass does this by itself; after a forward pass without one, the root's (and, on one rank, every
    block's) parameters would stay the gathered copies in the compute dtype.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
