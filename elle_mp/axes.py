"""Named axes: every parameter is declared once, as the axes that its dimensions are made of.

Tensor parallelism, initialisation, growth, optimizer state, checkpoints and conversion all read this declaration
(DESIGN.md, section 1); nothing repeats it. A dimension lists its axes outermost first; the axis that is cut
(tensor parallel) and grown stands outermost, so that an ordinary ``Shard`` cuts whole units::

    qkv.weight   [(kv_groups slot head_dim):write, embed:read]
    out.weight   [embed:write, (kv_groups queries head_dim):read]
    gate_up      [(mlp gate):write, embed:read]
    norm.weight  [embed:gain]

Query heads are ``kv_groups x queries``; ``slot`` is a group's queries, then its key, then its value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from math import prod


class Axis(str, Enum):
    """A logical axis of the model."""

    EMBED = "embed"
    KV_GROUPS = "kv_groups"
    QUERIES = "queries"
    SLOT = "slot"
    HEAD_DIM = "head_dim"
    MLP = "mlp"
    GATE = "gate"
    VOCAB = "vocab"
    POSITIONS = "positions"
    DOMAINS = "domains"
    TOKENS = "tokens"
    ONE = "one"


TENSOR_PARALLEL_AXES = frozenset({Axis.KV_GROUPS, Axis.MLP, Axis.VOCAB})
"""Axes that tensor parallelism cuts; ``embed`` and ``head_dim`` never are."""


class Role(str, Enum):
    """What a dimension does with its axis, which decides the scale of its copies (growth.md, 1.1)."""

    WRITE = "write"
    """The tensor produces the axis: copies carry ``rho``."""
    READ = "read"
    """The tensor consumes the axis: copies carry ``alpha`` (they sum to one over the copies of a unit)."""
    GAIN = "gain"
    """The weight of a norm: ``eta / rho``."""
    BIAS = "bias"
    """The bias of a norm: copied."""
    HEAD_GAIN = "head_gain"
    """The weight of the norm in front of a tied table: ``eta / (rho * c * rho)``."""
    HEAD_BIAS = "head_bias"
    """The bias of the norm in front of a tied table: ``1 / (c * rho)``."""
    COPY = "copy"
    """Copied as it is (the gate of an inserted layer)."""
    KEEP = "keep"
    """An axis that growth leaves alone (vocabulary, positions, domains)."""


@dataclass(frozen=True)
class Dim:
    """One dimension of a parameter: its axes, outermost first, and their role."""

    axes: tuple[Axis, ...]
    role: Role = Role.KEEP

    def size(self, sizes: Mapping[Axis, int]) -> int:
        """Number of elements of the dimension, given the size of every axis."""
        return prod(sizes[axis] for axis in self.axes)

    @property
    def outer(self) -> Axis:
        """The outermost axis: the one that is cut and grown."""
        return self.axes[0]


@dataclass(frozen=True)
class ParamSpec:
    """The declaration of one parameter.

    Attributes:
        dims: what each dimension is made of.
        std: standard deviation of the initial normal values; ``None`` for a constant.
        value: the constant when ``std`` is ``None``.
        decay: whether weight decay acts on it under ``optim.decay: matrices``.
    """

    dims: tuple[Dim, ...]
    std: float | None = None
    value: float = 0.0
    decay: bool = True

    def shape(self, sizes: Mapping[Axis, int]) -> tuple[int, ...]:
        """The global shape of the parameter."""
        return tuple(dim.size(sizes) for dim in self.dims)

    @property
    def tensor_parallel_dim(self) -> int | None:
        """The dimension that tensor parallelism cuts, or ``None`` when the parameter is replicated."""
        for index, dim in enumerate(self.dims):
            if dim.outer in TENSOR_PARALLEL_AXES:
                return index
        return None
