"""What may change in a model that is training: its norms become plain again, reserved ids come alive."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from elle_mp.models.layers import Attention, Mlp
from elle_mp.models.pipeline import LanguageModel
from elle_mp.models.transformer import Block, Transformer


@torch.no_grad()
def anneal_norms(model: LanguageModel, remaining: int) -> None:
    """One of ``remaining`` steps in which the weights of the norms' statistics go back to uniform (growth.md, 1.1).

    ``w += (1 / D - w) / remaining`` on the fp64 buffer ``[D]``: a straight line from any weights, on which each step
    follows from the one before it alone; exactly uniform when ``remaining`` is 1. Nothing happens to a model with
    plain norms.

    Raises:
        ValueError: no step remains.
    """
    if remaining < 1:
        raise ValueError(f"remaining={remaining}: the last step of annealing has remaining=1")
    uniform = 1.0 / model.spec.embed
    for part in model.parts:
        stats = part.norm_stats
        if stats is None:
            continue
        if remaining == 1:
            stats.fill_(uniform)
        else:
            stats.add_(uniform - stats, alpha=1.0 / remaining)


def settle_norms(model: LanguageModel) -> bool:
    """Makes a model whose statistics' weights are uniform one with plain norms, in place; whether its norms are plain.

    The next forward pass takes the ordinary LayerNorm, and the next checkpoint has no weights to keep.
    """
    stats = model.norm_stats
    if stats is None:
        return True
    if not bool((stats == 1.0 / model.spec.embed).all()):
        return False
    for part in model.parts:
        part.norm_stats = None
    _describe(model, weighted_norms=False)
    return True


def open_vocabulary(model: LanguageModel, ids: int) -> None:
    """Lets the softmax know the first ``ids`` ids: a tokenizer that has them is about to train. It never closes any.

    Raises:
        ValueError: the model has fewer ids.
    """
    spec = model.spec
    if ids > spec.vocab_size:
        raise ValueError(f"{ids} ids, and the model has {spec.vocab_size}")
    if ids > spec.softmax_vocab:
        _describe(model, live_vocab=0 if ids == spec.vocab_size else ids)


def _describe(model: LanguageModel, **changes: Any) -> None:
    """Changes the spec of a model and of every part that holds it."""
    spec = replace(model.spec, **changes)
    for module in model.modules():
        if isinstance(module, Transformer | Block | Attention | Mlp):
            module.spec = spec
