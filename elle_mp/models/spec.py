"""What a model is: its family's choices, its sizes, and what growth has left in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from elle_mp.axes import Axis
from elle_mp.config import Config, ModelConfig


@dataclass(frozen=True)
class ModelSpec:
    """The whole description of a model; with the tensors of a checkpoint it is the model.

    Attributes:
        family: the preset: ``bert``, ``gpt`` or ``llama``.
        queries: query heads per key/value group.
        vocab_size: ids of the model, reserved ones included; the table has ``padded_vocab`` rows.
        positions: longest sequence, the prompt included.
        domains: rows of the prompt table; ``prompt_tokens`` of them per domain.
        norm_eps: of every norm of the residual stream, as growth has scaled it.
        weighted_norms: whether norms weigh their statistics by the buffer ``norm_stats`` (growth.md, 1.1).
        gated: layers inserted behind a gate, ``x + g * (layer(x) - x)`` (growth.md, 1.5).
        lineage: for each layer, the id it carries through ``growth.depth: elle`` (elle.md, section 2).
    """

    family: str
    layers: int
    kv_groups: int
    queries: int
    head_dim: int
    embed: int
    mlp: int
    vocab_size: int
    padded_vocab: int
    positions: int
    domains: int
    prompt_tokens: int
    tied: bool
    dropout: float
    attention_dropout: float
    norm_eps: float
    rope_theta: float
    weighted_norms: bool = False
    gated: tuple[int, ...] = ()
    lineage: tuple[int, ...] = ()
    duplicated: tuple[int, ...] = ()
    """Lineage ids already duplicated in this doubling (``growth.depth: elle``)."""
    rope_exponents: tuple[float, ...] = ()
    """Exponents e of the inverse frequencies ``rope_theta ** -e`` of a head's pairs, ``head_dim / 2`` of them; empty
    for the standard ones, ``2 i / head_dim``. (Longer heads keep the frequencies of their old pairs.)"""
    live_vocab: int = 0
    """Ids that the softmax knows: those from here on are reserved and get no probability; 0 for all ``vocab_size``."""

    @classmethod
    def from_config(cls, config: Config, vocab_size: int) -> ModelSpec:
        """The model of the first stage.

        Args:
            vocab_size: ids of the tokenizer; ``model.vocab`` may reserve more.
        """
        model = config.model
        rows = max(vocab_size, model.vocab or 0)
        tied = model.tied if model.tied is not None else model.family != "llama"
        return cls(
            family=model.family,
            domains=len(config.stream),
            prompt_tokens=config.prompts.tokens,
            tied=tied,
            dropout=model.dropout,
            attention_dropout=model.dropout if model.attention_dropout is None else model.attention_dropout,
            norm_eps=model.norm_eps,
            rope_theta=model.rope_theta,
            lineage=tuple(range(model.layers)),
            live_vocab=vocab_size if rows > vocab_size else 0,
            **(sizes_of(model) | vocabulary_sizes(rows, model.vocab_multiple)),
        )

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> ModelSpec:
        """The inverse of :meth:`to_json`; fields that a model saved by an earlier version lacks have their defaults."""
        plain: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()
        }
        return cls(**plain)

    def to_json(self) -> dict[str, Any]:
        """Plain values for a checkpoint's metadata."""
        return asdict(self)

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.kv_groups * self.queries

    @property
    def causal(self) -> bool:
        """Whether a position sees only what stands before it (and the prompt)."""
        return self.family != "bert"

    @property
    def pre_norm(self) -> bool:
        """Whether norms stand in front of the sub-layers and not behind the residual adds."""
        return self.family != "bert"

    @property
    def rms_norm(self) -> bool:
        """RMSNorm instead of LayerNorm."""
        return self.family == "llama"

    @property
    def rotary(self) -> bool:
        """Rotary positions instead of a learned table."""
        return self.family == "llama"

    @property
    def biases(self) -> bool:
        """Whether linear layers and norms have biases."""
        return self.family != "llama"

    @property
    def gated_mlp(self) -> bool:
        """SwiGLU instead of GELU."""
        return self.family == "llama"

    @property
    def text_length(self) -> int:
        """Text positions of a sequence."""
        return self.positions - self.prompt_tokens

    @property
    def softmax_vocab(self) -> int:
        """Ids that can be predicted; the table's rows from there on are masked."""
        return self.live_vocab or self.vocab_size

    @property
    def axes(self) -> dict[Axis, int]:
        """The size of every axis."""
        return {
            Axis.EMBED: self.embed,
            Axis.KV_GROUPS: self.kv_groups,
            Axis.QUERIES: self.queries,
            Axis.SLOT: self.queries + 2,
            Axis.HEAD_DIM: self.head_dim,
            Axis.MLP: self.mlp,
            Axis.GATE: 2,
            Axis.VOCAB: self.padded_vocab,
            Axis.POSITIONS: self.positions,
            Axis.DOMAINS: self.domains,
            Axis.TOKENS: self.prompt_tokens,
            Axis.ONE: 1,
        }


def sizes_of(model: ModelConfig) -> dict[str, Any]:
    """The sizes that growth changes, as fields of :class:`ModelSpec`; the vocabulary's only if ``vocab`` is given."""
    vocabulary = {} if model.vocab is None else vocabulary_sizes(model.vocab, model.vocab_multiple)
    return {
        "layers": model.layers,
        "kv_groups": model.groups,
        "queries": model.heads // model.groups,
        "head_dim": model.head_dim,
        "embed": model.embed,
        "mlp": model.mlp_size,
        "positions": model.seq_len,
        **vocabulary,
    }


def vocabulary_sizes(ids: int, multiple: int) -> dict[str, int]:
    """``vocab_size`` and ``padded_vocab``, the next multiple of ``model.vocab_multiple``."""
    return {"vocab_size": ids, "padded_vocab": -(-ids // multiple) * multiple}
