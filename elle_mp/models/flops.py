"""Parameters and floating-point operations of a model, by formula."""

from __future__ import annotations

from math import prod

from elle_mp.models.spec import ModelSpec
from elle_mp.models.transformer import Transformer
from elle_mp.parallel.sharding import named_specs

MASKED_SHARE = 0.15
"""Share of the text positions that an MLM predicts, and so that pass the head."""


def parameter_count(model: Transformer) -> int:
    """Parameters of the whole model (the padded vocabulary's rows included)."""
    return sum(prod(spec.shape(model.sizes)) for _, spec in named_specs(model))


def training_flops_per_token(spec: ModelSpec) -> float:
    """Forward and backward of one position, 3 x 2 operations a weight (Kaplan et al., arXiv 2001.08361, table 1).

    Counts the matrices, the scores and mixing of attention (half of the square when causal), and the table where a
    position is predicted; not the lookups and not recomputation.
    """
    width, inner = spec.embed, spec.heads * spec.head_dim
    qkv_rows = spec.kv_groups * (spec.queries + 2) * spec.head_dim
    mlp = (3 if spec.gated_mlp else 2) * width * spec.mlp
    weights = spec.layers * (width * qkv_rows + inner * width + mlp)
    scores = spec.layers * 2 * spec.positions * inner * (0.5 if spec.causal else 1.0)
    predicted = spec.text_length / spec.positions * (1.0 if spec.causal else MASKED_SHARE)
    head = spec.padded_vocab * width + (0 if spec.pre_norm else width * width)
    return 6.0 * (weights + scores + predicted * head)
