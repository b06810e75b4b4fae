"""Parameters and floating-point operations of a model, by formula."""

from __future__ import annotations

from math import prod

from elle_mp.models.declarations import declarations
from elle_mp.models.spec import ModelSpec

MASKED_SHARE = 0.15
"""Share of the text positions that an MLM predicts, and so that pass the head."""


def parameter_count(spec: ModelSpec) -> int:
    """Parameters of the whole model (the padded vocabulary's rows included)."""
    return sum(prod(item.shape(spec.axes)) for item in declarations(spec).values())


def training_flops_per_token(spec: ModelSpec) -> float:
    """Forward and backward of one position, 3 x 2 operations a weight (Kaplan et al., arXiv 2001.08361, table 1).

    Counts the matrices, the scores and mixing of attention (half of the square when causal), and the table where a
    position is predicted; not the lookups and not recomputation.
    """
    return 6.0 * (spec.layers * _layer(spec) + _head(spec))


def head_layers(spec: ModelSpec) -> float:
    """What the head costs, in layers."""
    return _head(spec) / _layer(spec)


def _layer(spec: ModelSpec) -> float:
    """Multiplications of one layer for a position."""
    width, inner = spec.embed, spec.heads * spec.head_dim
    qkv_rows = spec.kv_groups * (spec.queries + 2) * spec.head_dim
    mlp = (3 if spec.gated_mlp else 2) * width * spec.mlp
    scores = 2 * spec.positions * inner * (0.5 if spec.causal else 1.0)
    return width * qkv_rows + inner * width + mlp + scores


def _head(spec: ModelSpec) -> float:
    """Multiplications of the head for a position, prompts and what is not predicted averaged in."""
    predicted = spec.text_length / spec.positions * (1.0 if spec.causal else MASKED_SHARE)
    return predicted * (spec.padded_vocab * spec.embed + (0 if spec.pre_norm else spec.embed**2))
