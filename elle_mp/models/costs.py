"""What a layer and the ends of a model take on this layout, by the clock (``parallel.split: measured``)."""

from __future__ import annotations

import gc
import time
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from elle_mp.data.batches import Batch
from elle_mp.models.build import Precision, empty_part
from elle_mp.models.spec import ModelSpec
from elle_mp.models.transformer import Transformer
from elle_mp.ops.dropout import DropoutKey
from elle_mp.parallel.data_parallel import synchronise_gradients
from elle_mp.parallel.mesh import Grid
from elle_mp.parallel.pipeline import Costs, Part
from elle_mp.parallel.sharding import initialise

WARM_UP = 2
"""Passes that are not counted: the first ones allocate and, on a GPU, choose kernels."""
REPEATS = 7
"""Passes whose median counts."""

LAYER = Part(range(1), first=False, last=False)
FIRST = Part(range(0), first=True, last=False)
LAST = Part(range(0), first=False, last=True)


def measure_costs(spec: ModelSpec, grid: Grid, precision: Precision, batch: Batch, seed: int) -> Costs:
    """Times forward and backward of one layer and of both ends on one micro-batch, as they are sharded and cut here.

    They are made one after the other and freed again, so that a rank never holds more than a table beside what it has.
    All ranks of the grid measure at the same time, as they compute at the same time; what counts is their mean.
    Collective over them.

    Args:
        batch: a micro-batch of this rank.
        seed: of weights and dropout.

    Returns:
        The same on every rank.
    """
    seconds = []
    for part in (LAYER, FIRST, LAST):
        model = empty_part(spec, grid, precision, grid.parallel.reshard_after_forward, part)
        initialise(model, seed)
        dist.barrier(group=grid.everyone)
        seconds.append(_pass_seconds(model, precision, batch.to(grid.device), seed))
        del model
        gc.collect()  # FSDP2's hooks hold what they hang on
    mean = torch.tensor(seconds, dtype=torch.float64, device=grid.device)
    dist.all_reduce(mean, group=grid.everyone)
    mean /= dist.get_world_size(grid.everyone)
    dist.broadcast(mean, src=0, group=grid.everyone)  # a sum may be rounded in another order elsewhere
    return Costs(*mean.tolist())


def _pass_seconds(model: Transformer, precision: Precision, batch: Batch, seed: int) -> float:
    """Median time of a micro-batch that is not the last of its step: gradients add up and are not reduced."""
    synchronise_gradients(model, False)
    grid, part = model.grid, model.part
    rows, text = batch.tokens.shape
    shape = rows, grid.local_length(text + model.spec.prompt_tokens), model.spec.embed
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(shape, generator=generator).to(grid.device, precision.compute)
    inputs = batch.tokens if part.first else hidden.requires_grad_()
    gradient = None if part.last else torch.randn(shape, generator=generator).to(grid.device, precision.compute)
    times = []
    for _ in range(WARM_UP + REPEATS):
        began = _now(grid.device)
        out: Tensor = model(inputs, batch.domain, batch.targets, DropoutKey(seed, batch.key))
        out.backward(gradient)
        times.append(_now(grid.device) - began)
        hidden.grad = None
    return median(times[WARM_UP:])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
