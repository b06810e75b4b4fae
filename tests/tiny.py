"""Tiny models for tests: specs, grids, weights that do not depend on the layout, batches, whole tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from elle_mp.config import Config, GrowConfig, GrowthConfig, ModelConfig, OptimConfig, ParallelConfig, grown
from elle_mp.growth.apply import Moments, grow_on_shards
from elle_mp.growth.plan import GrowthPlan, make_plan
from elle_mp.models.build import Precision, empty_model
from elle_mp.models.spec import ModelSpec
from elle_mp.models.transformer import Transformer
from elle_mp.ops.random import normal_block
from elle_mp.parallel.mesh import Grid, make_grid, start_distributed
from elle_mp.parallel.sharding import copies_of, initialise, local_tensor, my_bounds, named_specs
from elle_mp.train.optimizer import ShardedAdamW

FAMILIES = ("bert", "gpt", "llama")
VOCAB = 300
TEXT = 10

# The configuration's sizes of a tiny model; llama has grouped keys and values.
SIZES: dict[str, Any] = {
    "layers": 2,
    "heads": 4,
    "head_dim": 8,
    "mlp": 40,
    "seq_len": 12,
    "vocab_multiple": 64,
}

# Every family, tied and untied, with grouped keys and values and without.
MODELS: dict[str, dict[str, Any]] = {
    "bert": {"family": "bert"},
    "gpt": {"family": "gpt"},
    "gpt untied": {"family": "gpt", "tied": False},
    "llama": {"family": "llama", "kv_groups": None},
    "llama tied": {"family": "llama", "kv_groups": None, "tied": True},
    "llama GQA": {"family": "llama", "kv_groups": 2},
    "llama GQA tied": {"family": "llama", "kv_groups": 2, "tied": True},
}
# A growth without noise whose steps are those of the model that did not grow.
PLAIN: dict[str, Any] = {"noise_db": None, "rate": "mup"}


def config_of(family: str, **changes: Any) -> Config:
    """A configuration of two domains, two prompt tokens each; ``changes`` are keys of ``model``."""
    model = SIZES | {"family": family} | ({"kv_groups": 2} if family == "llama" else {}) | changes
    stages = [{"domain": name, "data": "none", "steps": 1} for name in "ab"]
    return Config.model_validate({"model": model, "prompts": {"tokens": 2}, "stream": stages})


def spec_of(family: str, **changes: Any) -> ModelSpec:
    """The spec of :func:`config_of`."""
    return ModelSpec.from_config(config_of(family, **changes), VOCAB)


def grid(**parallel: Any) -> Grid:
    """A grid over all ranks there are (one, outside of ``run_distributed``)."""
    torch.set_num_threads(1)
    return make_grid(ParallelConfig.model_validate(parallel), start_distributed())


def model_of(
    spec: ModelSpec, place: Grid, dtype: torch.dtype = torch.float64, seed: int = 1, spread: float = 0.2
) -> Transformer:
    """A model whose every parameter is moved away from its initial value: no bias is zero, no gain one."""
    model = empty_model(spec, place, Precision(dtype, dtype))
    initialise(model, seed)
    scatter(model, seed + 1, spread)
    return model


@torch.no_grad()
def scatter(model: Transformer, seed: int, spread: float) -> None:
    """Adds normal values to every parameter, the same under every layout."""
    specs, copies = dict(named_specs(model)), copies_of(model)
    for name, parameter in model.named_parameters():
        shape = specs[name].shape(model.sizes)
        local = local_tensor(parameter)
        bounds = my_bounds(specs[name], shape, model.grid)
        local.add_(normal_block(seed, f"test/{copies.get(name, name)}", shape, bounds, local.dtype), alpha=spread)


@torch.no_grad()
def scatter_moments(model: Transformer, optimizer: ShardedAdamW, seed: int, step: int) -> None:
    """Fills Adam's state with random values, the same under every layout."""
    specs = dict(named_specs(model))
    for name, state in optimizer.moments.items():
        shape = specs[name].shape(model.sizes)
        bounds = my_bounds(specs[name], shape, model.grid)
        state.first.copy_(normal_block(seed, f"first/{name}", shape, bounds, state.first.dtype))
        state.second.copy_(normal_block(seed, f"second/{name}", shape, bounds, state.second.dtype).square())
        state.step.fill_(step)


def whole(tensor: Tensor) -> Tensor:
    """The global tensor on every rank, detached."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def weights(model: Transformer) -> dict[str, Tensor]:
    """Every parameter, whole."""
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


def gradients(model: Transformer) -> dict[str, Tensor]:
    """The gradient of every parameter, whole; zeros where there is none."""
    out = {}
    for name, parameter in model.named_parameters():
        out[name] = torch.zeros_like(whole(parameter)) if parameter.grad is None else whole(parameter.grad)
    return out


def moments(optimizer: ShardedAdamW) -> dict[str, Tensor]:
    """Adam's whole state by name: ``NAME.step``, ``NAME.exp_avg``, ``NAME.exp_avg_sq``."""
    return {name: whole(tensor) for name, tensor in optimizer.tensors().items()}


def text(count: int, seed: int = 0, length: int = TEXT) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens ``[count, length]``, domains ``[count]`` and targets, all random."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCAB, (count, length), generator=generator)
    domain = torch.randint(0, 2, (count,), generator=generator)
    domain[: min(2, count)] = torch.tensor([0, 1])[: min(2, count)]
    return tokens, domain, torch.randint(0, VOCAB, (count, length), generator=generator)


@torch.no_grad()
def logits(model: Transformer, tokens: Tensor, domain: Tensor) -> Tensor:
    """``[B, T, VOCAB]``, the ids that can be predicted; one rank only."""
    return model(tokens, domain)[..., : model.spec.softmax_vocab]


def train(model: Transformer, optimizer: ShardedAdamW, steps: int, seed: int = 0) -> list[float]:
    """Real steps of one rank; returns the mean losses."""
    losses = []
    for step in range(steps):
        tokens, domain, targets = text(3, seed=1000 * seed + step)
        loss = model(tokens, domain, targets) / targets.numel()
        loss.backward()
        optimizer.step(1.0)
        losses.append(float(loss.detach()))
    return losses


def optimizer_of(model: Transformer, **changes: Any) -> ShardedAdamW:
    """AdamW with ``optim``'s defaults, or as changed."""
    return ShardedAdamW(model, OptimConfig.model_validate(changes))


def plan_of(
    spec: ModelSpec, sizes: ModelConfig, grow: Mapping[str, Any], **growth: Any
) -> tuple[GrowthPlan, ModelConfig]:
    """A plan, and the sizes after it."""
    new = grown(sizes, GrowConfig.model_validate(grow))
    return make_plan(spec, new, GrowthConfig.model_validate(growth), seed=7), new


def copying_plan_of(
    spec: ModelSpec, sizes: ModelConfig, grow: Mapping[str, Any], **growth: Any
) -> tuple[GrowthPlan, ModelConfig]:
    """As :func:`plan_of`, with the exact strategy that only copies: gradients and steps map, too."""
    whole = grown(sizes, GrowConfig.model_validate(grow)).embed % spec.embed == 0
    width = "replicate" if whole else "iso" if spec.rms_norm else "weighted"
    return plan_of(spec, sizes, grow, **{"width": width} | growth)


def plans_of(model: str, *grows: Mapping[str, Any], **growth: Any) -> list[GrowthPlan]:
    """One plan after the other of a model of :data:`MODELS`, as :func:`copying_plan_of` makes them, :data:`PLAIN`."""
    spec, sizes = spec_of(**MODELS[model]), config_of(**MODELS[model]).model
    out = []
    for grow in grows:
        plan, sizes = copying_plan_of(spec, sizes, grow, **PLAIN | growth)
        spec = plan.new
        out.append(plan)
    return out


def apply(
    plan: GrowthPlan, old: Transformer, old_moments: Mapping[str, Moments], **optim: Any
) -> tuple[Transformer, ShardedAdamW, int]:
    """The grown model, its optimizer, and the bytes received."""
    dtype = next(old.parameters()).dtype
    new = empty_model(plan.new, old.grid, Precision(dtype, dtype))
    optimizer = optimizer_of(new, **optim)
    traffic = grow_on_shards(plan, old, new, old_moments, optimizer.moments)
    return new, optimizer, traffic.received
