"""Runs the model of a stored checkpoint, in more memory than its largest layer but not than the whole."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import nn

from elle_mp.checkpoint.stream_reader import StoredTensors
from elle_mp.models.declarations import declarations, hollow_model
from elle_mp.models.pipeline import LanguageModel
from elle_mp.models.spec import ModelSpec
from elle_mp.parallel.sharding import ShardedModule

PREFIX = "model."


ACTIVATIONS = 12
"""Of a layer, in widths of the residual stream and of the MLP: what its forward pass holds at a time."""


def streaming_bytes(spec: ModelSpec, tokens: int) -> int:
    """Memory in which :func:`stored_model` computes logits in fp64, layers not resident: tables, two layers, and what
    a pass over ``tokens`` makes (attention scores of short sequences are less)."""
    layers: dict[str, int] = {}
    tables = 0
    for name, item in declarations(spec).items():
        size = prod(item.shape(spec.axes))
        if name.startswith("layers."):
            layer = name.split(".")[1]
            layers[layer] = layers.get(layer, 0) + size
        else:
            tables += size
    passing = tokens * (ACTIVATIONS * (spec.embed + spec.mlp) + 3 * spec.padded_vocab)
    return 8 * (tables + 2 * max(layers.values()) + passing)


def stored_model(spec: ModelSpec, tensors: StoredTensors, dtype: torch.dtype, resident: bool) -> LanguageModel:
    """A model for forward passes on this rank, its weights read from a checkpoint.

    Args:
        dtype: weights and computation; fp64 is the most that a CPU offers.
        resident: keep the layers once they are read. Otherwise each is read when it is run and dropped after it.
    """
    model = hollow_model(spec, dtype)
    for prefix, module in _modules(model, ""):
        if not prefix.startswith("layers."):
            _fill(module, prefix, tensors, dtype)
    if spec.weighted_norms:
        model.norm_stats = tensors.read(f"{PREFIX}norm_stats", ((0, spec.embed),))
    for index, block in model.layers.items():
        _run_from_file(block, f"layers.{index}", tensors, dtype, resident)
    return model.eval()


def _modules(module: nn.Module, prefix: str) -> Iterator[tuple[str, ShardedModule]]:
    for name, part in module.named_modules(prefix=prefix):
        if isinstance(part, ShardedModule):
            yield name, part


def _fill(module: ShardedModule, prefix: str, tensors: StoredTensors, dtype: torch.dtype) -> None:
    """Gives a module's own parameters their values, as plain tensors."""
    for name, spec in module.specs.items():
        bounds = tuple((0, size) for size in spec.shape(module.sizes))
        full = f"{PREFIX}{prefix}.{name}" if prefix else f"{PREFIX}{name}"
        values = tensors.read(full, bounds).to(dtype)
        module.register_parameter(name, nn.Parameter(values, requires_grad=False))


def _empty(block: nn.Module) -> None:
    for _, part in _modules(block, ""):
        for name in part.specs:
            part.register_parameter(name, nn.Parameter(torch.empty(0, device="meta"), requires_grad=False))


def _run_from_file(block: nn.Module, prefix: str, tensors: StoredTensors, dtype: torch.dtype, resident: bool) -> None:
    def read(module: nn.Module, inputs: Any) -> None:
        if next(module.parameters()).is_meta:
            for name, part in _modules(module, prefix):
                _fill(part, name, tensors, dtype)

    def drop(module: nn.Module, inputs: Any, output: Any) -> None:
        _empty(module)

    block.register_forward_pre_hook(read)
    if not resident:
        block.register_forward_hook(drop)
