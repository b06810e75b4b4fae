"""Parameters stored as DTensor, computed as local tensors (DESIGN.md, section 1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import ceil

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from elle_mp.axes import Axis, ParamSpec
from elle_mp.ops.random import Bounds, normal_block
from elle_mp.parallel.mesh import Grid


class ShardedModule(nn.Module):
    """A module that declares its parameters by their axes.

    Parameters are made on the meta device, cut over the ``tp`` mesh axis as their declaration says; FSDP2 cuts them
    further, and :func:`elle_mp.parallel.data_parallel.materialize` gives them memory.
    """

    def __init__(self, grid: Grid, sizes: Mapping[Axis, int], dtype: torch.dtype) -> None:
        super().__init__()
        self.grid = grid
        self.sizes = sizes
        self.dtype = dtype
        self.specs: dict[str, ParamSpec] = {}

    @property
    def tp_group(self) -> dist.ProcessGroup | None:
        """The tensor-parallel group, or ``None`` when one rank holds everything (no collective is issued then)."""
        return self.grid.group("tp") if self.grid.tp_size > 1 else None

    def declare(self, name: str, spec: ParamSpec) -> None:
        """Registers the parameter ``name`` with its declaration."""
        shape = torch.Size(spec.shape(self.sizes))
        cut = spec.tensor_parallel_dim
        local = list(shape)
        if cut is not None:
            local[cut] //= self.grid.tp_size
        parameter = DTensor.from_local(
            torch.empty(local, dtype=self.dtype, device="meta"),
            self.grid.tp_mesh,
            [Replicate() if cut is None else Shard(cut)],
            run_check=False,
            shape=shape,
            stride=torch.empty(shape, device="meta").stride(),
        )
        self.specs[name] = spec
        self.register_parameter(name, nn.Parameter(parameter))

    def local(self, name: str) -> Tensor:
        """This rank's part of a parameter as a plain tensor, differentiable; ``None`` is never returned."""
        return local_tensor(self.get_parameter(name))


def local_tensor(tensor: Tensor) -> Tensor:
    """The local part of a DTensor (with autograd), or the plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def named_specs(model: nn.Module) -> Iterator[tuple[str, ParamSpec]]:
    """Every parameter's full name and declaration, in registration order."""
    for prefix, module in model.named_modules():
        if isinstance(module, ShardedModule):
            for name, spec in module.specs.items():
                yield f"{prefix}.{name}" if prefix else name, spec


def shard_bounds(spec: ParamSpec, shape: tuple[int, ...], tp: tuple[int, int], shard: tuple[int, int]) -> Bounds:
    """Global indices held by the rank with coordinates ``tp = (rank, size)`` and ``shard = (rank, size)``.

    Tensor parallelism cuts into equal parts; FSDP2 then cuts dimension 0 of the part into chunks of
    ``ceil(rows / size)`` rows, the last ones shorter or empty.
    """
    bounds = [(0, size) for size in shape]
    cut = spec.tensor_parallel_dim
    if cut is not None:
        part = shape[cut] // tp[1]
        bounds[cut] = (tp[0] * part, (tp[0] + 1) * part)
    start, stop = bounds[0]
    chunk = ceil((stop - start) / shard[1])
    begin = min(start + shard[0] * chunk, stop)
    bounds[0] = (begin, min(begin + chunk, stop))
    return tuple(bounds)


def my_bounds(spec: ParamSpec, shape: tuple[int, ...], grid: Grid) -> Bounds:
    """:func:`shard_bounds` of this rank."""
    tp = (grid.tp_rank, grid.tp_size)
    return shard_bounds(spec, shape, tp, (grid.rank("shard"), grid.size("shard")))


@torch.no_grad()
def initialise(model: ShardedModule, seed: int) -> None:
    """Fills every parameter by (seed, name, global index): the same weights under every layout."""
    specs = dict(named_specs(model))
    for name, parameter in model.named_parameters():
        spec = specs[name]
        local = local_tensor(parameter)
        if spec.std is None:
            local.fill_(spec.value)
            continue
        shape = spec.shape(model.sizes)
        block = normal_block(seed, f"init/{name}", shape, my_bounds(spec, shape, model.grid), local.dtype)
        local.copy_(block.mul_(spec.std))
