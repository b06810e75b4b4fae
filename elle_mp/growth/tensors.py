"""Growth of one parameter: indices, scales and noise on a block of it (growth.md, 1.1 and 1.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from elle_mp.axes import ParamSpec, Role
from elle_mp.growth.maps import AxisMap, dim_map
from elle_mp.growth.plan import PAPER_NOISE_STD, GrowthPlan
from elle_mp.ops.random import Bounds, normal_block

SILENCED = ("attention.out_weight", "attention.out_bias", "mlp.out_weight", "mlp.out_bias")
"""What an inserted pre-norm layer writes into the residual stream: zero at first (growth.md, 1.5)."""


@dataclass(frozen=True)
class TensorGrowth:
    """How one parameter grows.

    Attributes:
        name: of the new parameter.
        source: of the old one; ``None`` for a parameter that is new altogether (the gate of an inserted layer).
        dims: the map of each dimension, ``None`` where nothing moves.
        scales: per dimension the factor ``s`` of each new entry, fp64 ``[N']``.
        copies: per dimension the number of copies of each entry's source, fp64 ``[N']``.
        silenced: the values become zero (the noise stays).
        fresh: Adam starts anew here: moments and step are zero.
        noisy: the dimension whose copies are told apart by noise.
    """

    name: str
    source: str | None
    shape: tuple[int, ...]
    dims: tuple[AxisMap | None, ...]
    scales: tuple[Tensor | None, ...]
    copies: tuple[Tensor | None, ...]
    silenced: bool
    fresh: bool
    noisy: int | None
    spec: ParamSpec

    @property
    def identity(self) -> bool:
        """Whether the parameter stays bitwise as it is."""
        return not self.silenced and self.source is not None and all(item is None for item in self.dims)

    def source_bounds(self, bounds: Bounds) -> Bounds:
        """The smallest block of the old parameter that the block ``bounds`` of the new one is made of."""
        out = []
        for item, (start, stop) in zip(self.dims, bounds, strict=True):
            if item is None or start == stop:
                out.append((start, stop))
                continue
            part = item.index[start:stop]
            out.append((int(part.min()), int(part.max()) + 1))
        return tuple(out)


def plan_tensor(plan: GrowthPlan, name: str, spec: ParamSpec) -> TensorGrowth:
    """What the plan does to the new parameter ``name``."""
    source, layer = plan.source(name)
    maps = plan.maps_of(layer)
    added = layer is not None and plan.inserted[layer] and not plan.duplicates_layers
    is_gate = name.endswith(".gate")
    dims = tuple(dim_map(dim, maps, plan.old.axes) for dim in spec.dims)
    pairs = list(zip(spec.dims, dims, strict=True))
    noisy = [index for index, (dim, item) in enumerate(pairs) if dim.role is Role.READ and item is not None]
    return TensorGrowth(
        name=name,
        source=None if is_gate and added else source,
        shape=spec.shape(plan.new.axes),
        dims=dims,
        scales=tuple(None if item is None else _scale(dim.role, item) for dim, item in pairs),
        copies=tuple(None if item is None else item.counts for item in dims),
        silenced=added and plan.depth == "zero_out" and name.endswith(SILENCED),
        fresh=added or plan.moments == "reset",
        noisy=noisy[0] if noisy else None,
        spec=spec,
    )


def _scale(role: Role, item: AxisMap) -> Tensor:
    """The factor of each copy, by the role of its dimension."""
    ones = torch.ones_like(item.counts)
    if role is Role.WRITE:
        return item.rho
    if role is Role.READ:
        return item.alpha
    if role is Role.GAIN:
        return item.eta / item.rho
    if role is Role.HEAD_GAIN:
        return item.eta / (item.rho * item.counts * item.rho)
    if role is Role.HEAD_BIAS:
        return 1.0 / (item.counts * item.rho)
    return ones


def grow_block(growth: TensorGrowth, plan: GrowthPlan, old: Tensor, old_bounds: Bounds, bounds: Bounds) -> Tensor:
    """The block ``bounds`` of the grown weight, from the block ``old_bounds`` of the old one."""
    values = _multiply(_gather(growth, old, old_bounds, bounds), growth.scales, bounds, 1)
    noise = _noise(growth, plan, values, bounds)
    if growth.silenced:
        values = torch.zeros_like(values)
    return values if noise is None else values + noise


def grow_moment(growth: TensorGrowth, old: Tensor, old_bounds: Bounds, bounds: Bounds, degree: int) -> Tensor:
    """The block of a grown Adam moment of ``degree`` 1 or 2 in the gradient: ``r = 1 / (n s)`` to that power."""
    ratios = tuple(
        None if scale is None or copies is None else 1.0 / (copies * scale)
        for scale, copies in zip(growth.scales, growth.copies, strict=True)
    )
    return _multiply(_gather(growth, old, old_bounds, bounds), ratios, bounds, degree)


def _gather(growth: TensorGrowth, old: Tensor, old_bounds: Bounds, bounds: Bounds) -> Tensor:
    block = old
    for dim, (item, (low, _), (start, stop)) in enumerate(zip(growth.dims, old_bounds, bounds, strict=True)):
        if item is not None:
            block = block.index_select(dim, (item.index[start:stop] - low).to(block.device))
        elif (start - low, stop - low) != (0, block.shape[dim]):
            block = block.narrow(dim, start - low, stop - start)
    return block.clone() if block is old else block


def _multiply(block: Tensor, factors: tuple[Tensor | None, ...], bounds: Bounds, power: int) -> Tensor:
    for dim, (factor, (start, stop)) in enumerate(zip(factors, bounds, strict=True)):
        if factor is None or bool((factor == 1).all()):
            continue
        shape = [1] * block.dim()
        shape[dim] = stop - start
        block = block * (factor[start:stop] ** power).to(block).view(shape)
    return block


def _noise(growth: TensorGrowth, plan: GrowthPlan, values: Tensor, bounds: Bounds) -> Tensor | None:
    """Noise that tells copies apart, on the dimension that is read; ``None`` where there is none."""
    dim = growth.noisy
    if dim is None or values.numel() == 0:
        return None
    paper = plan.width == "elle"
    if not paper and plan.noise_db is None:
        return None
    item = growth.dims[dim]
    if item is None:
        raise ValueError(f"{growth.name}: no copies along dimension {dim}")
    stream = f"growth/{plan.new.layers}x{plan.new.embed}x{plan.new.mlp}/{growth.name}"
    xi = normal_block(plan.seed, stream, growth.shape, bounds, torch.float64).to(values.device)
    start, stop = bounds[dim]
    if paper:
        # Only copies, not originals, are noised, and the noise does not cancel (elle.md, 1.6).
        copied = (torch.arange(start, stop) >= item.old).to(values.device)
        shape = [1] * values.dim()
        shape[dim] = stop - start
        return (PAPER_NOISE_STD * xi * copied.view(shape)).to(values.dtype)
    return _zero_sum(values, xi, item.index[start:stop].to(values.device), dim, float(plan.noise_db or 0.0))


def _zero_sum(values: Tensor, xi: Tensor, index: Tensor, dim: int, decibels: float) -> Tensor:
    """Noise relative to each value that sums to zero over the copies of a unit, matrix-valued (growth.md, 1.4).

    All copies of a unit lie in this block (floor maps never split them over ranks), so the sum is local, and being
    relative to the value itself it needs no norm of the whole tensor: no communication.
    """
    units, inverse = torch.unique(index, return_inverse=True)
    shape = list(xi.shape)
    shape[dim] = len(units)
    sums = torch.zeros(shape, dtype=xi.dtype, device=xi.device).index_add_(dim, inverse, xi)
    count = torch.zeros(len(units), dtype=xi.dtype, device=xi.device).index_add_(
        0, inverse, torch.ones_like(inverse, dtype=xi.dtype)
    )
    view = [1] * xi.dim()
    view[dim] = len(units)
    centred = xi - (sums / count.view(view)).index_select(dim, inverse)
    return (10.0 ** (-decibels / 20.0) * centred * values).to(values.dtype)
