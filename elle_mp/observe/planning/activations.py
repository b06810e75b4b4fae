"""What autograd keeps for the backward pass, from the ops of :mod:`elle_mp.models.layers`, one term a tensor."""

from __future__ import annotations

from elle_mp.observe.planning.setting import Setting
from elle_mp.ops.dropout import threshold
from elle_mp.ops.linear_cross_entropy import chunk_rows

ID = 8
"""Bytes of a token's id."""


def layer_bytes(setting: Setting, gated: bool = False, recompute: str | None = None) -> int:
    """Activations that one layer keeps of one micro-batch.

    Args:
        gated: the layer stands behind a gate.
        recompute: as in the configuration; the setting's when not given.
    """
    level = setting.parallel.recompute if recompute is None else recompute
    if level == "full":
        return _stream(setting)
    kept = _attention(setting)
    kept += _stream(setting) if level == "selective" else _mlp(setting)
    # x + gate * (y - x): the gate's gradient wants the difference.
    return kept + (_stream(setting) if gated else 0)


def recomputed_bytes(setting: Setting, gated: bool = False) -> int:
    """What exists again while one layer's activations are computed again."""
    level = setting.parallel.recompute
    if level == "none":
        return 0
    return layer_bytes(setting, gated, "none") - _stream(setting) if level == "full" else _mlp(setting)


def embedding_bytes(setting: Setting) -> int:
    """Kept of the embeddings of one micro-batch: the ids, and what a norm behind them keeps."""
    spec = setting.spec
    ids = setting.micro * spec.text_length * (ID + (1 if setting.tp > 1 else 0))
    if spec.pre_norm:
        return ids
    if setting.tp == 1 and _compiled(setting):
        # elle_mp.ops.prompt_embedding makes the norm's input again from the tables.
        return ids + 2 * setting.positions_between * setting.statistics
    return ids + _norm(setting, setting.positions_between)


def head_bytes(setting: Setting) -> int:
    """Kept of the head of one micro-batch, every position predicted: rows, and gradients formed in the forward pass."""
    spec, rows = setting.spec, setting.predicted
    row = rows * spec.embed * setting.compute
    # The gradient of the hidden rows, and that of the whole table (elle_mp.ops.linear_cross_entropy).
    kept = row + spec.padded_vocab // setting.tp * spec.embed * setting.compute
    kept += _norm(setting, rows)
    if not spec.pre_norm:
        kept += 2 * row + spec.padded_vocab // setting.tp * setting.compute
    return kept


def head_working_bytes(setting: Setting) -> int:
    """What exists besides while the loss is computed: a chunk of logits, and the sum over chunks of the table's
    gradient in fp32."""
    table = setting.spec.padded_vocab // setting.tp
    row = table * setting.compute
    rows = chunk_rows(setting.predicted, (table, setting.spec.embed), setting.compute)
    summed = table * setting.spec.embed * setting.statistics if rows < setting.predicted else 0
    return summed + rows * row


def stage_bytes(setting: Setting, stage: int) -> int:
    """Activations of one micro-batch in one pipeline stage, from its forward to its backward pass."""
    part = setting.parts[stage]
    kept = sum(layer_bytes(setting, layer in setting.spec.gated) for layer in part.layers)
    # What arrives from the stage before lies in its buffer (see elle_mp.observe.planning.memory).
    kept += embedding_bytes(setting) if part.first else -_stream(setting)
    return kept + (head_bytes(setting) if part.last else _stream(setting))


def _stream(setting: Setting) -> int:
    """The residual stream between sub-layers."""
    return setting.positions_between * setting.spec.embed * setting.compute


def _norm(setting: Setting, rows: int) -> int:
    """What a norm of so many rows keeps: its input and its statistics."""
    spec = setting.spec
    plain = not spec.rms_norm and not spec.weighted_norms
    weights = spec.embed * setting.statistics if spec.weighted_norms and setting.compute < 8 else 0
    return rows * (spec.embed * setting.compute + (2 if plain else 1) * setting.statistics) + weights


def _projected(setting: Setting) -> int:
    """The input of a sub-layer's first projection, cut along the sequence even when that gathers it."""
    return setting.positions_between * setting.spec.embed * setting.compute


def _attention(setting: Setting) -> int:
    """Norm, fused projection, attention, projection back."""
    spec, e, n = setting.spec, setting.compute, setting.positions
    heads, groups = spec.heads // setting.tp, spec.kv_groups // setting.tp
    inner, keys = n * heads * spec.head_dim * e, n * groups * spec.head_dim * e
    mixed = inner + n * heads * setting.statistics
    kept = _norm(setting, setting.positions_between) + _projected(setting) + mixed
    if spec.rotary:
        # Cosine and sine in the computation's type, once for queries and once for keys; in fp64 it is theirs already.
        kept += 4 * spec.positions // setting.cp * spec.head_dim // 2 * e if e < 8 else 0
    if setting.cp > 1:
        # Queries without a turn are a view of the projection, where each group has one of them.
        view = _compiled(setting) and not spec.rotary and spec.queries == 1
        return kept + inner + (2 * keys if view else 0) + 2 * keys * setting.cp
    if not spec.rotary or _chunked(setting):
        return kept + inner + 2 * keys
    # Turned queries and keys, and, for the values, the projection that they are a view of.
    return kept + (inner + keys) + (inner + 2 * keys)


def _compiled(setting: Setting) -> bool:
    """Whether the kernels for the CPU fit, and attention is :mod:`elle_mp.ops.expanded_attention`."""
    return setting.device == "cpu" and setting.compute < 8


def _chunked(setting: Setting) -> bool:
    """Whether it is :mod:`elle_mp.ops.chunked_attention`."""
    return threshold(setting.spec.attention_dropout) > 0 and not _compiled(setting)


def _mlp(setting: Setting) -> int:
    """Norm, projection, activation, projection back."""
    inner = setting.positions * setting.spec.mlp // setting.tp * setting.compute
    # GELU keeps its input, and the projection behind it its output; SwiGLU: gate and up, silu(gate), their product.
    kept = (4 if setting.spec.gated_mlp else 2) * inner
    return kept + _norm(setting, setting.positions_between) + _projected(setting)
