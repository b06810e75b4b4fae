"""One transformer for every family: embeddings with domain prompts, blocks, head."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from elle_mp.axes import Axis, Dim, ParamSpec, Role
from elle_mp.models.layers import INIT_STD, Attention, Mlp, Norm, Pass, bias, matrix, rotary_table
from elle_mp.models.spec import ModelSpec
from elle_mp.ops.activations import gelu
from elle_mp.ops.dropout import DropoutKey
from elle_mp.ops.embedding import lookup
from elle_mp.ops.linear_cross_entropy import linear_cross_entropy
from elle_mp.ops.prompt_embedding import prompt_embedding
from elle_mp.parallel.collectives import (
    copy_to_tp,
    gather_sequence_whole,
    reduce_from_tp,
    reduce_scatter_sequence,
)
from elle_mp.parallel.mesh import Grid
from elle_mp.parallel.pipeline import Part
from elle_mp.parallel.sequence import Positions, behind, below, positions, select, whole_length
from elle_mp.parallel.sharding import ShardedModule

SITES_PER_LAYER = 3
"""Dropout acts on the attention weights and on both sub-layers' outputs."""

TOKEN_TABLE = ParamSpec((Dim((Axis.VOCAB,)), Dim((Axis.EMBED,), Role.WRITE)), std=INIT_STD)
"""The input table; when it is tied, also the output table."""

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
        """Maps the residual stream ``x [B, R, D]`` (this rank's positions) through the layer."""
        return self._kept("full", self._layer, x, shared)

    def _layer(self, x: Tensor, shared: Pass) -> Tensor:
        if self.spec.pre_norm and self.grid.parallel.recompute != "selective":
            branch = self.attention(self.attention_norm(x, shared), shared)
            normal, h = self._norm_of_sum(self.mlp_norm, branch, x, shared, 1)
            y = h + self._drop(self.mlp(normal, shared), shared, 2)
        else:
            # What is recomputed keeps one tensor, so it begins at the sum.
            y = self._kept("selective", self._with_mlp, self._with_attention(x, shared), shared)
        return x + self.local("gate") * (y - x) if self.gated else y

    def _with_attention(self, x: Tensor, shared: Pass) -> Tensor:
        if self.spec.pre_norm:
            return x + self._drop(self.attention(self.attention_norm(x, shared), shared), shared, 1)
        return self._norm_of_sum(self.attention_norm, self.attention(x, shared), x, shared, 1)[0]

    def _with_mlp(self, x: Tensor, shared: Pass) -> Tensor:
        if self.spec.pre_norm:
            return x + self._drop(self.mlp(self.mlp_norm(x, shared), shared), shared, 2)
        return self._norm_of_sum(self.mlp_norm, self.mlp(x, shared), x, shared, 2)[0]

    def _norm_of_sum(self, norm: Norm, x: Tensor, residual: Tensor, shared: Pass, site: int) -> tuple[Tensor, Tensor]:
        return norm.of_sum(x, residual, shared, self.spec.dropout, self.site + site)

    def _kept(self, level: str, part: Callable[[Tensor, Pass], Tensor], x: Tensor, shared: Pass) -> Tensor:
        """``part(x, shared)``; of its activations only ``x`` is kept when ``parallel.recompute`` is ``level``.

        Dropout masks are drawn by key, so no generator's state has to be put back.
        """
        if self.grid.parallel.recompute != level or not torch.is_grad_enabled():
            return part(x, shared)
        out: Tensor = checkpoint(part, x, shared, use_reentrant=False, preserve_rng_state=False)
        return out

    def _drop(self, x: Tensor, shared: Pass, site: int) -> Tensor:
        return shared.drop(x, self.spec.dropout, self.site + site)


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
    """A language model of any family, or the part of one that a pipeline stage holds.

    ``forward`` is the only entry: it returns the sum of the losses over all targets, or the logits when there are
    no targets, so that FSDP2's hooks see every use of the root's parameters (the tied table has two).
    """

    norm_stats: Tensor | None

    def __init__(self, spec: ModelSpec, grid: Grid, dtype: torch.dtype, part: Part | None = None) -> None:
        super().__init__(grid, spec.axes, dtype)
        self.spec = spec
        self.part = part = part or Part(range(spec.layers))
        if part.first:
            self._declare_embeddings(spec, dtype)
        self.layers = nn.ModuleDict({str(index): Block(grid, spec, dtype, index) for index in part.layers})
        if part.last:
            self._declare_head(spec, dtype)
        stats = torch.empty(spec.embed, dtype=torch.float64, device="meta") if spec.weighted_norms else None
        self.register_buffer("norm_stats", stats)

    def _declare_embeddings(self, spec: ModelSpec, dtype: torch.dtype) -> None:
        self.declare("token_table", TOKEN_TABLE)
        if not spec.rotary:
            dims = (Dim((Axis.POSITIONS,)), Dim((Axis.EMBED,), Role.WRITE))
            self.declare("position_table", ParamSpec(dims, std=INIT_STD))
        if spec.prompt_tokens:
            prompt = (Dim((Axis.DOMAINS,)), Dim((Axis.TOKENS,)), Dim((Axis.EMBED,), Role.WRITE))
            self.declare("prompt_table", ParamSpec(prompt, std=INIT_STD))
        if not spec.pre_norm:
            self.embedding_norm = Norm(self.grid, spec, dtype)

    def _declare_head(self, spec: ModelSpec, dtype: torch.dtype) -> None:
        if spec.pre_norm:
            self.final_norm = Norm(self.grid, spec, dtype, in_front_of_table=spec.tied)
        else:
            self.head = MlmHead(self.grid, spec, dtype)
        if not spec.tied:
            dims = (Dim((Axis.VOCAB,)), Dim((Axis.EMBED,), Role.READ))
            self.declare("output_table", ParamSpec(dims, std=INIT_STD))
        elif not self.part.first:
            self.declare("output_table", TOKEN_TABLE)
            self.copies["output_table"] = "token_table"

    @property
    def parts(self) -> tuple[Transformer, ...]:
        """As of a :class:`elle_mp.models.pipeline.Pipeline`: itself."""
        return (self,)

    def forward(
        self,
        inputs: Tensor,
        domain: Tensor,
        targets: Tensor | None = None,
        key: DropoutKey | None = None,
    ) -> Tensor:
        """Runs the model, or its part, on one micro-batch.

        Args:
            inputs: text ids ``[B, T]`` (masked ones for ``bert``), whole sequences on every rank; for a part that is
                not the first the hidden states ``[B, R, D]`` of this rank's positions.
            domain: ``[B]`` row of the prompt table of each sequence.
            targets: ``[B, T]`` ids to predict, :data:`IGNORED` where nothing is predicted.
            key: the dropout key; ``None`` for no dropout (evaluation).

        Returns:
            The sum of the cross entropies of this context-parallel rank's targets (a scalar, the same on every
            tensor-parallel rank), or without targets this rank's logits ``[B, T / cp, padded_vocab / tp]``, prompts
            left out; hidden states ``[B, R, D]`` of a part that is not the last.
        """
        prompt = self.spec.prompt_tokens
        length = inputs.shape[1] + prompt if self.part.first else whole_length(self.grid, inputs.shape[1])
        shared = self._shared(length, key)
        x = self._embed(inputs, domain, shared) if self.part.first else inputs
        for block in self.layers.values():
            x = block(x, shared)
        if not self.part.last:
            return x
        x = self._text(x, shared.positions)
        if targets is None:
            return F.linear(self._before_table(x, shared), self._table(), self._table_bias())
        return self._losses(x, targets, shared)

    def _text(self, x: Tensor, positions: Positions) -> Tensor:
        """Of ``x [B, R, D]`` between sub-layers the text that this context-parallel rank has, ``[B, T', D]``."""
        if positions.cut_over_tp:
            # The head is computed alike on all tensor-parallel ranks.
            x = gather_sequence_whole(x, self.tp_group)
        return x[:, sum(map(len, below(positions.context, self.spec.prompt_tokens))) :]

    def _losses(self, x: Tensor, targets: Tensor, shared: Pass) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        chosen = select(targets, behind(shared.positions.context, self.spec.prompt_tokens)).reshape(-1)
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
        mine = positions(self.grid, length, self.spec.causal)
        rotary = None
        if self.spec.rotary:
            cos, sin = rotary_table(self.spec, length, self.grid.device)
            rotary = select(cos, mine.context, 0), select(sin, mine.context, 0)
        dropping = key is not None and max(self.spec.dropout, self.spec.attention_dropout) > 0
        return Pass(mine, self.norm_stats, rotary, key if dropping else None)

    def _embed(self, tokens: Tensor, domain: Tensor, shared: Pass) -> Tensor:
        if self.tp_group is None and not self.grid.parallel.apex:
            return self._embed_at_once(tokens, domain, shared)
        x = self._vectors(tokens, domain, shared.positions)
        if not self.spec.rotary:
            table = self.local("position_table")[: shared.positions.length]
            x = x + select(table, shared.positions.residual, 0)
        if not self.spec.pre_norm:
            x = self.embedding_norm(x, shared)
        return shared.drop(x, self.spec.dropout, 0)

    def _embed_at_once(self, tokens: Tensor, domain: Tensor, shared: Pass) -> Tensor:
        """:meth:`_embed` where this rank has the whole table."""
        spec, runs = self.spec, shared.positions.residual
        return prompt_embedding(
            self.local("token_table"),
            select(tokens, behind(runs, spec.prompt_tokens)),
            runs,
            position_table=None if spec.rotary else self.local("position_table"),
            prompt_table=self.local("prompt_table") if spec.prompt_tokens else None,
            domains=domain,
            norm=None if spec.pre_norm else self.embedding_norm.gain(shared),
            p=spec.dropout,
            key=shared.site(0),
        )

    def _vectors(self, tokens: Tensor, domain: Tensor, positions: Positions) -> Tensor:
        """The rows of the prompts and the tokens that stand at this rank's positions, ``[B, R, D]``."""
        prompt = self.spec.prompt_tokens
        text = select(tokens, behind(positions.context, prompt))
        x = lookup(self.local("token_table"), text, self._vocab_start)
        if not positions.cut_over_tp:
            x = reduce_from_tp(x, self.tp_group)
        if prompt:
            rows = select(self.local("prompt_table")[domain], below(positions.context, prompt))
            if positions.cut_over_tp and self.grid.tp_rank > 0:
                rows = rows * 0  # the first rank's are in the sum, and these have a gradient, too
            x = torch.cat((rows, x), dim=1)
        return reduce_scatter_sequence(x, self.tp_group) if positions.cut_over_tp else x

    def _before_table(self, x: Tensor, shared: Pass) -> Tensor:
        x = self.final_norm(x, shared) if self.spec.pre_norm else self.head(x, shared)
        return copy_to_tp(x, self.tp_group)

    def _table(self) -> Tensor:
        return self.local("token_table" if self.spec.tied and self.part.first else "output_table")

    def _table_bias(self) -> Tensor | None:
        return None if self.spec.pre_norm else self.head.local("table_bias")
