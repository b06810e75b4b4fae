"""The parts of a block: norm, attention, MLP. One class each for every family; the spec says which variant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elle_mp.axes import Axis, Dim, ParamSpec, Role
from elle_mp.models.spec import ModelSpec
from elle_mp.ops.activations import gelu
from elle_mp.ops.apex import load_apex
from elle_mp.ops.attention import attention, packed_attention
from elle_mp.ops.dropout import DropoutKey, dropout
from elle_mp.ops.norms import layer_norm, residual_rms_norm, rms_norm, weighted_layer_norm
from elle_mp.ops.prompt_embedding import Gain
from elle_mp.parallel.collectives import (
    copy_to_tp,
    gather_linear,
    gather_runs,
    reduce_from_tp,
    reduce_scatter_sequence,
)
from elle_mp.parallel.mesh import Grid
from elle_mp.parallel.sequence import Positions
from elle_mp.parallel.sharding import ShardedModule

INIT_STD = 0.02
"""Standard deviation of initial weights (BERT, GPT-2 and Llama alike)."""

QKV_OUT = (Axis.KV_GROUPS, Axis.SLOT, Axis.HEAD_DIM)
HEADS_IN = (Axis.KV_GROUPS, Axis.QUERIES, Axis.HEAD_DIM)
MLP_GATED = (Axis.MLP, Axis.GATE)


@dataclass(frozen=True)
class Pass:
    """What every layer of one forward pass shares.

    Attributes:
        positions: which of the sequence this rank holds.
        norm_stats: weights ``[D]`` of the norms' statistics, or ``None`` for uniform ones.
        rotary: cosine and sine ``[Sq, head_dim / 2]`` of the positions that attention has queries of, or ``None``.
        dropout: the key of this pass's dropout masks, or ``None`` for no dropout.
    """

    positions: Positions
    norm_stats: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    dropout: DropoutKey | None = None

    def site(self, number: int) -> DropoutKey | None:
        """The key of one place in the model where dropout acts."""
        return None if self.dropout is None else self.dropout.site(number)

    def drop(self, x: Tensor, p: float, number: int) -> Tensor:
        """Drops elements of ``x [B, S, D]``, hidden states between sub-layers, at one place in the model."""
        key = self.site(number)
        return x if key is None else dropout(x, p, key, self.positions.rows)


def matrix(write: tuple[Axis, ...], read: tuple[Axis, ...], std: float = INIT_STD) -> ParamSpec:
    """The declaration of a linear layer's weight."""
    return ParamSpec((Dim(write, Role.WRITE), Dim(read, Role.READ)), std=std)


def bias(write: tuple[Axis, ...]) -> ParamSpec:
    """The declaration of a linear layer's bias."""
    return ParamSpec((Dim(write, Role.WRITE),), decay=False)


class Norm(ShardedModule):
    """LayerNorm or RMSNorm over the residual stream. ``in_front_of_table``: the next reader is the tied table."""

    def __init__(self, grid: Grid, spec: ModelSpec, dtype: torch.dtype, in_front_of_table: bool = False) -> None:
        super().__init__(grid, spec.axes, dtype)
        self.eps = spec.norm_eps
        self.rms = spec.rms_norm
        self.apex = load_apex() if grid.parallel.apex else None
        gain = Role.HEAD_GAIN if in_front_of_table else Role.GAIN
        self.declare("weight", ParamSpec((Dim((Axis.EMBED,), gain),), value=1.0, decay=False))
        if not self.rms:
            shift = Role.HEAD_BIAS if in_front_of_table else Role.BIAS
            self.declare("bias", ParamSpec((Dim((Axis.EMBED,), shift),), decay=False))

    def forward(self, x: Tensor, shared: Pass) -> Tensor:
        """Normalises ``x [..., D]``."""
        if self.rms:
            return rms_norm(x, self.local("weight"), self.eps, self.apex)
        return layer_norm(x, self.local("weight"), self.local("bias"), self.eps, shared.norm_stats, self.apex)

    def gain(self, shared: Pass) -> Gain:
        """What an op that has a LayerNorm in it wants to know of this one."""
        return self.local("weight"), self.local("bias"), self.eps, shared.norm_stats

    def of_sum(self, x: Tensor, residual: Tensor, shared: Pass, p: float, number: int) -> tuple[Tensor, Tensor]:
        """The norm of ``h = residual + dropout(x)``, and ``h``; all ``[B, R, D]``.

        Args:
            p, number: of the dropout, as of :meth:`Pass.drop`.
        """
        if self.apex is not None:
            h = residual + shared.drop(x, p, number)
            return self(h, shared), h
        options: dict[str, Any] = {"p": p, "key": shared.site(number), "first_row": shared.positions.rows}
        weight = self.local("weight")
        if self.rms:
            return residual_rms_norm(x, residual, weight, self.eps, **options)
        return weighted_layer_norm(x, residual, weight, self.local("bias"), self.eps, shared.norm_stats, **options)


class SubLayer(ShardedModule):
    """What attention and MLP share: the projections out of the residual stream and back into it.

    The stream ``[B, R, D]`` has the positions of this rank between sub-layers; inside, every tensor-parallel rank has
    all of the ``Sq`` positions of its context-parallel part (``R = Sq / tp`` with sequence parallelism, else ``Sq``).
    """

    def column_parallel(self, x: Tensor, name: str, shared: Pass) -> Tensor:
        """Maps ``x [B, R, D]`` to this rank's inner units ``[B, Sq, N / tp]``."""
        weight = self.local(f"{name}_weight")
        bias = self.local(f"{name}_bias") if f"{name}_bias" in self.specs else None
        if self.tp_group is not None and shared.positions.cut_over_tp:
            return gather_linear(x, weight, bias, self.tp_group)
        return F.linear(copy_to_tp(x, self.tp_group), weight, bias)

    def row_parallel(self, x: Tensor, shared: Pass) -> Tensor:
        """Maps this rank's inner units ``x [B, Sq, N / tp]`` to ``[B, R, D]``, summed over the ranks; bias once."""
        bias = self.local("out_bias") if "out_bias" in self.specs else None
        if self.tp_group is None:
            return F.linear(x, self.local("out_weight"), bias)
        leave = reduce_scatter_sequence if shared.positions.cut_over_tp else reduce_from_tp
        out = leave(F.linear(x, self.local("out_weight")), self.tp_group)
        return out if bias is None else out + bias


class Attention(SubLayer):
    """Grouped-query self-attention; query heads, keys and values of a group lie together and are cut together."""

    def __init__(self, grid: Grid, spec: ModelSpec, dtype: torch.dtype, site: int) -> None:
        super().__init__(grid, spec.axes, dtype)
        self.spec = spec
        self.site = site
        self.declare("qkv_weight", matrix(QKV_OUT, (Axis.EMBED,)))
        self.declare("out_weight", matrix((Axis.EMBED,), HEADS_IN, std=INIT_STD / (2 * spec.layers) ** 0.5))
        if spec.biases:
            self.declare("qkv_bias", bias(QKV_OUT))
            self.declare("out_bias", bias((Axis.EMBED,)))

    def forward(self, x: Tensor, shared: Pass) -> Tensor:
        """Maps ``x [B, R, D]`` to ``[B, R, D]``; the output is not yet dropped out nor added."""
        spec = self.spec
        groups = spec.kv_groups // self.grid.tp_size
        qkv = self.column_parallel(x, "qkv", shared)
        qkv = qkv.view(*qkv.shape[:2], groups, spec.queries + 2, spec.head_dim)
        return self.row_parallel(self._attend(qkv, shared, groups * spec.queries).flatten(2), shared)

    def _attend(self, qkv: Tensor, shared: Pass, heads: int) -> Tensor:
        """Attention of ``qkv [B, Sq, G, slots, head_dim]``: ``[B, Sq, heads, head_dim]``."""
        spec = self.spec
        dropout = spec.attention_dropout if shared.dropout is not None else 0.0
        key, first_head = shared.site(self.site), self.grid.tp_rank * heads
        masks: dict[str, Any] = {
            "causal": spec.causal,
            "dropout": dropout,
            "key": key,
            "first_head": first_head,
            "heads": spec.heads,
        }
        positions = shared.positions
        if shared.rotary is None and not positions.gathers_keys:
            return packed_attention(qkv, **masks)
        q = qkv[:, :, :, : spec.queries].reshape(*qkv.shape[:2], heads, spec.head_dim)
        k, v = qkv[:, :, :, spec.queries], qkv[:, :, :, spec.queries + 1]
        if shared.rotary is not None:
            q, k = rotate(q, *shared.rotary), rotate(k, *shared.rotary)
        if positions.gathers_keys:
            k, v = gather_runs(torch.stack((k, v), 3), self.grid.group("cp"), positions.layout).unbind(3)
            masks["runs"] = positions.context
        return attention(q, k, v, **masks)


class Mlp(SubLayer):
    """GELU (``gpt``: the tanh form; ``bert``: exact) or SwiGLU; inner units are cut, gate and up together."""

    def __init__(self, grid: Grid, spec: ModelSpec, dtype: torch.dtype) -> None:
        super().__init__(grid, spec.axes, dtype)
        self.spec = spec
        inner: tuple[Axis, ...] = MLP_GATED if spec.gated_mlp else (Axis.MLP,)
        self.declare("in_weight", matrix(inner, (Axis.EMBED,)))
        self.declare("out_weight", matrix((Axis.EMBED,), (Axis.MLP,), std=INIT_STD / (2 * spec.layers) ** 0.5))
        if spec.biases:
            self.declare("in_bias", bias(inner))
            self.declare("out_bias", bias((Axis.EMBED,)))

    def forward(self, x: Tensor, shared: Pass) -> Tensor:
        """Maps ``x [B, R, D]`` to ``[B, R, D]``."""
        spec = self.spec
        inner = self.column_parallel(x, "in", shared)
        if spec.gated_mlp:
            gate, up = inner.view(*inner.shape[:-1], -1, 2).unbind(-1)
            inner = F.silu(gate) * up
        else:
            inner = gelu(inner, tanh=spec.family == "gpt")
        return self.row_parallel(inner, shared)


def rotary_table(spec: ModelSpec, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``[length, head_dim / 2]`` in fp64 (RoFormer, arXiv 2104.09864)."""
    if spec.rope_exponents:
        exponents = torch.tensor(spec.rope_exponents, dtype=torch.float64, device=device)
    else:
        exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float64, device=device) / spec.head_dim
    angles = torch.outer(torch.arange(length, dtype=torch.float64, device=device), spec.rope_theta**-exponents)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs ``(x_i, x_{i + head_dim / 2})`` of ``x [B, S, H, head_dim]`` by their position's angle."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
