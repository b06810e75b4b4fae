"""Parameters stored as DTensor, computed as local tensors (DESIGN.md, section 1)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import ceil
from typing import cast

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
        self.copies: dict[str, str] = {}
        """Parameters that repeat one of another part, and its name: their values are always the same."""

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
        parameter = torch.empty(local, dtype=self.dtype, device="meta")
        # DeepSpeed shards plain tensors, each of which is what tensor parallelism leaves to this rank.
        if self.grid.mesh is not None and self.grid.parallel.engine == "fsdp":
            parameter = DTensor.from_local(
                parameter,
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


class PartedModule(nn.Module):
    """Some parts of a larger module, each of which names its parameters as the whole does."""

    parts: Sequence[ShardedModule]

    def __init__(self, parts: Iterable[ShardedModule]) -> None:
        super().__init__()
        self.parts = cast(Sequence[ShardedModule], nn.ModuleList(parts))

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of all parts under their names in the whole."""
        for part in self.parts:
            yield from part.named_parameters(prefix, recurse, remove_duplicate)

    def get_parameter(self, target: str) -> nn.Parameter:
        """The parameter of this name in the whole.

        Raises:
            AttributeError: no part has it.
        """
        for part in self.parts:
            try:
                return part.get_parameter(target)
            except AttributeError:
                continue
        raise AttributeError(f"no part has a parameter {target}")


def local_tensor(tensor: Tensor) -> Tensor:
    """The local part of a DTensor (with autograd), or the plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def named_specs(model: nn.Module) -> Iterator[tuple[str, ParamSpec]]:
    """Every parameter's full name and declaration, in registration order."""
    if isinstance(model, PartedModule):
        for part in model.parts:
            yield from named_specs(part)
        return
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
    """:func:`shard_bounds` of this rank; under DeepSpeed, of the parameter that it computes with."""
    tp = (grid.tp_rank, grid.tp_size)
    shard = (grid.rank("shard"), grid.size("shard")) if grid.parallel.engine == "fsdp" else (0, 1)
    return shard_bounds(spec, shape, tp, shard)


def copies_of(model: nn.Module) -> dict[str, str]:
    """Parameters that repeat one of another pipeline stage, by name, and its name."""
    if isinstance(model, PartedModule):
        return {name: original for part in model.parts for name, original in copies_of(part).items()}
    return model.copies if isinstance(model, ShardedModule) else {}


@torch.no_grad()
def initialise(model: ShardedModule | PartedModule, seed: int) -> None:
    """Fills every parameter by (seed, name, global index): the same weights under every layout."""
    specs, copies = dict(named_specs(model)), copies_of(model)
    root = model if isinstance(model, ShardedModule) else model.parts[0]
    for name, parameter in model.named_parameters():
        spec = specs[name]
        local = local_tensor(parameter)
        if spec.std is None:
            local.fill_(spec.value)
            continue
        shape = spec.shape(root.sizes)
        key = f"init/{copies.get(name, name)}"
        block = normal_block(seed, key, shape, my_bounds(spec, shape, root.grid), local.dtype)
        local.copy_(block.mul_(spec.std))
