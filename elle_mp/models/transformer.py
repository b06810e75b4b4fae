"""One transformer for every family: embeddings with domain prompts, blocks, head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elle_mp.axes import Axis, Dim, ParamSpec, Role
from elle_mp.models.layers import INIT_STD, Attention, Mlp, Norm, Pass, bias, matrix, rotary_table
from elle_mp.models.spec import ModelSpec
from elle_mp.ops.activations import gelu
from elle_mp.ops.dropout import DropoutKey, dropout
from elle_mp.ops.embedding import lookup
from elle_mp.ops.linear_cross_entropy import linear_cross_entropy
from elle_mp.parallel.collectives import copy_to_tp, reduce_from_tp
from elle_mp.parallel.mesh import Grid
from elle_mp.parallel.sharding import ShardedModule

SITES_PER_LAYER = 3
"""Dropout acts on the attention weights and on both sub-layers' outputs."""

IGNORED = -100
"""A target that is not predicted."""


class Block(ShardedModule):
    """One layer: attention and MLP with their norms before (gpt, llama) or after (bert) them."""

    def __init__(self, grid: Grid, spec: ModelSpec, dtype: torch.dtype, index: int) -> None:
        super().__init__(grid, spec.axes, dtype)
        self.spec = spec
        self.site = 1 + SITES_PER_LAYER * index
        self.attention_norm = Norm(grid, spec, dtype)
        self.attention = Attention(grid, spec, dtype, self.site)
        self.mlp_norm = Norm(grid, spec, dtype)
        self.mlp = Mlp(grid, spec, dtype)
        self.gated = index in spec.gated
        if self.gated:
            self.declare("gate", ParamSpec((Dim((Axis.ONE,), Role.COPY),), decay=False))

    def forward(self, x: Tensor, shared: Pass) -> Tensor:
        """Maps the residual stream ``x [B, S, D]`` through the layer."""
        if self.spec.pre_norm:
            x = x + self._drop(self.attention(self.attention_norm(x, shared), shared), shared, 1)
            return x + self._drop(self.mlp(self.mlp_norm(x, shared), shared), shared, 2)
        y = self.attention_norm(x + self._drop(self.attention(x, shared), shared, 1), shared)
        y = self.mlp_norm(y + self._drop(self.mlp(y, shared), shared, 2), shared)
        return x + self.local("gate") * (y - x) if self.gated else y

    def _drop(self, x: Tensor, shared: Pass, site: int) -> Tensor:
        key = shared.site(self.site + site)
        return x if key is None else dropout(x, self.spec.dropout, key)


class MlmHead(ShardedModule):
    """BERT's transform in front of the tied table: dense, GELU, LayerNorm; and the table's bias."""

    def __init__(self, grid: Grid, spec: ModelSpec, dtype: torch.dtype) -> None:
        super().__init__(grid, spec.axes, dtype)
        self.declare("dense_weight", matrix((Axis.EMBED,), (Axis.EMBED,)))
        self.declare("dense_bias", bias((Axis.EMBED,)))
        self.norm = Norm(grid, spec, dtype, in_front_of_table=True)
        self.declare("table_bias", ParamSpec((Dim((Axis.VOCAB,)),), decay=False))

    def forward(self, x: Tensor, shared: Pass) -> Tensor:
        """Maps hidden states ``[..., D]`` to what the table reads."""
        return self.norm(gelu(F.linear(x, self.local("dense_weight"), self.local("dense_bias"))), shared)


class Transformer(ShardedModule):
    """A language model of any family.

    ``forward`` is the only entry: it returns the sum of the losses over all targets, or the logits when there are
    no targets, so that FSDP2's hooks see every use of the root's parameters (the tied table has two).
    """

    norm_stats: Tensor | None

    def __init__(self, spec: ModelSpec, grid: Grid, dtype: torch.dtype) -> None:
        super().__init__(grid, spec.axes, dtype)
        self.spec = spec
        self.declare("token_table", ParamSpec((Dim((Axis.VOCAB,)), Dim((Axis.EMBED,), Role.WRITE)), std=INIT_STD))
        if not spec.rotary:
            dims = (Dim((Axis.POSITIONS,)), Dim((Axis.EMBED,), Role.WRITE))
            self.declare("position_table", ParamSpec(dims, std=INIT_STD))
        if spec.prompt_tokens:
            prompt = (Dim((Axis.DOMAINS,)), Dim((Axis.TOKENS,)), Dim((Axis.EMBED,), Role.WRITE))
            self.declare("prompt_table", ParamSpec(prompt, std=INIT_STD))
        if not spec.pre_norm:
            self.embedding_norm = Norm(grid, spec, dtype)
        self.layers = nn.ModuleDict({str(index): Block(grid, spec, dtype, index) for index in range(spec.layers)})
        if spec.pre_norm:
            self.final_norm = Norm(grid, spec, dtype, in_front_of_table=spec.tied)
        else:
            self.head = MlmHead(grid, spec, dtype)
        if not spec.tied:
            dims = (Dim((Axis.VOCAB,)), Dim((Axis.EMBED,), Role.READ))
            self.declare("output_table", ParamSpec(dims, std=INIT_STD))
        stats = torch.empty(spec.embed, dtype=torch.float64, device="meta") if spec.weighted_norms else None
        self.register_buffer("norm_stats", stats)

    def forward(
        self,
        tokens: Tensor,
        domain: Tensor,
        targets: Tensor | None = None,
        key: DropoutKey | None = None,
    ) -> Tensor:
        """Runs the model on one micro-batch.

        Args:
            tokens: ``[B, T]`` text ids (masked ones for ``bert``).
            domain: ``[B]`` row of the prompt table of each sequence.
            targets: ``[B, T]`` ids to predict, :data:`IGNORED` where nothing is predicted.
            key: the dropout key; ``None`` for no dropout (evaluation).

        Returns:
            The sum of the targets' cross entropies (a scalar, the same on every tensor-parallel rank), or without
            targets this rank's logits ``[B, T, padded_vocab / tp]``.
        """
        shared = self._shared(tokens.shape[1] + self.spec.prompt_tokens, key)
        x = self._embed(tokens, domain, shared)
        for block in self.layers.values():
            x = block(x, shared)
        x = x[:, self.spec.prompt_tokens :]
        if targets is None:
            return F.linear(self._before_table(x, shared), self._table(), self._table_bias())
        rows = x.reshape(-1, x.shape[-1])
        chosen = targets.reshape(-1)
        wanted = chosen != IGNORED
        if not bool(wanted.all()):
            index = wanted.nonzero().squeeze(1)
            rows, chosen = rows.index_select(0, index), chosen.index_select(0, index)
        return linear_cross_entropy(
            self._before_table(rows, shared),
            self._table(),
            chosen,
            bias=self._table_bias(),
            vocab_start=self._vocab_start,
            vocab_size=self.spec.softmax_vocab,
            group=self.tp_group,
        )

    @property
    def _vocab_start(self) -> int:
        return self.grid.tp_rank * (self.spec.padded_vocab // self.grid.tp_size)

    def _shared(self, length: int, key: DropoutKey | None) -> Pass:
        rotary = rotary_table(self.spec, length, self.grid.device) if self.spec.rotary else None
        dropping = key is not None and max(self.spec.dropout, self.spec.attention_dropout) > 0
        return Pass(self.norm_stats, rotary, key if dropping else None)

    def _embed(self, tokens: Tensor, domain: Tensor, shared: Pass) -> Tensor:
        table = self.local("token_table")
        x = reduce_from_tp(lookup(table, tokens, self._vocab_start), self.tp_group)
        if self.spec.prompt_tokens:
            x = torch.cat((self.local("prompt_table")[domain], x), dim=1)
        if not self.spec.rotary:
            x = x + self.local("position_table")[: x.shape[1]]
        if not self.spec.pre_norm:
            x = self.embedding_norm(x, shared)
        site = shared.site(0)
        return x if site is None else dropout(x, self.spec.dropout, site)

    def _before_table(self, x: Tensor, shared: Pass) -> Tensor:
        x = self.final_norm(x, shared) if self.spec.pre_norm else self.head(x, shared)
        return copy_to_tp(x, self.tp_group)

    def _table(self) -> Tensor:
        return self.local("token_table" if self.spec.tied else "output_table")

    def _table_bias(self) -> Tensor | None:
        return None if self.spec.pre_norm else self.head.local("table_bias")
