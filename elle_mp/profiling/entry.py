"""What the profiler knows of an op: its shapes, its inputs, its peers, and what it must move and compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Run = Callable[[bool], tuple[Tensor, ...]]
"""One call, with its backward pass or without; the results that all sides must agree on (gradients after outputs)."""


@dataclass(frozen=True)
class Case:
    """An op on inputs of one shape and type.

    Attributes:
        ours: the op.
        peers: what else computes the same thing; their results are compared before anything is timed.
        yardsticks: what is only as much work: timed, not compared.
        moved: bytes that have to be read and written, forward, and forward with backward.
        operations: floating-point operations that are needed, likewise; 0 where memory is all there is.
    """

    ours: Run
    peers: Mapping[str, Run]
    moved: tuple[float, float]
    operations: tuple[float, float] = (0.0, 0.0)
    yardsticks: Mapping[str, Run] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """An op of the profiler's table.

    Attributes:
        dims: what the numbers of a shape are.
        shapes: the sweep; the first is what ``--quick`` takes.
        dtypes: names of torch types, of each device kind what it can do.
        make: inputs of a shape, a type, on a device.
        backward: whether there is a backward pass.
    """

    name: str
    dims: str
    shapes: tuple[tuple[int, ...], ...]
    make: Callable[[tuple[int, ...], torch.dtype, torch.device], Case]
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    backward: bool = True


def differentiated(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor], gradients: Sequence[Tensor]
) -> Run:
    """``function`` of ``inputs``, and backward from ``gradients`` of its outputs to all inputs."""

    def run(backward: bool) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_(backward) for x in inputs]
        found = function(*leaves)
        outputs = found if isinstance(found, tuple) else (found,)
        return (*outputs, *torch.autograd.grad(outputs, leaves, gradients)) if backward else outputs

    return run


def normal(generator: torch.Generator, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Seeded normal numbers, drawn on the CPU: the same on every device."""
    return torch.randn(tuple(shape), generator=generator).to(device, dtype)


def seeded() -> torch.Generator:
    """The generator of a case's inputs."""
    return torch.Generator().manual_seed(1)
