"""AdamW on this rank's shards of the masters, with the state that growth and checkpoints need by name."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from elle_mp.axes import ParamSpec
from elle_mp.config import OptimConfig
from elle_mp.growth.apply import Moments
from elle_mp.growth.factors import After, Factors
from elle_mp.models.build import Precision, checking_copy
from elle_mp.models.declarations import declarations
from elle_mp.models.pipeline import LanguageModel, copy_tied
from elle_mp.ops.apex import load_apex
from elle_mp.parallel.data_parallel import synchronise_gradients
from elle_mp.parallel.mesh import Grid
from elle_mp.parallel.sequence import sum_partial_gradients
from elle_mp.parallel.sharding import copies_of, initialise, local_tensor, my_bounds, named_specs
from elle_mp.train.apex import ApexAdamW
from elle_mp.train.entries import Age, Settings, ShardFactors, shard_factors, step_by_entry

NO_GROWTH = After()
"""A step that no growth bears on."""


class ShardedAdamW:
    """``torch.optim.AdamW`` (fused) over the local shards; DTensor's dispatch stays off the step's path.

    The state exists from the start, so a checkpoint always holds the same tensors. A parameter whose entries have
    rates, epsilons or ages of their own takes :func:`elle_mp.train.entries.step_by_entry` instead; the state is shared.

    Args:
        factors: what growth left, by parameter; one that is missing has factors of one and is old.

    Attributes:
        moments: this rank's part of Adam's state of every parameter, by name.
    """

    def __init__(self, model: LanguageModel, optim: OptimConfig, factors: Mapping[str, Factors] | None = None) -> None:
        self.model = model
        self.grid: Grid = model.grid
        self.parameters = dict(model.named_parameters())
        self.specs: Mapping[str, ParamSpec] = dict(named_specs(model))
        self.copies: Mapping[str, str] = copies_of(model)
        self.shards = {name: local_tensor(item).detach() for name, item in self.parameters.items()}
        self.lr = optim.lr
        self.clip = optim.clip
        self.betas = optim.betas
        self.eps = optim.eps
        self.decay = {name: optim.weight_decay if self._decays(name, optim) else 0.0 for name in self.shards}
        self.factors = self._cut(model, factors or {})
        self.inner = inner_optimizer(self._groups(), optim, self.grid.parallel.apex)
        self.moments: dict[str, Moments] = {}
        for name, item in self.shards.items():
            state = Moments(
                torch.zeros((), dtype=torch.float32, device=item.device),
                torch.zeros_like(item),
                torch.zeros_like(item),
            )
            self.moments[name] = state
            self.inner.state[item] = {"step": state.step, "exp_avg": state.first, "exp_avg_sq": state.second}

    # What the engine of data parallelism does about the model (FSDP2 here; DeepSpeed in a subclass)

    def initialise(self, seed: int) -> None:
        """Fills every parameter by (seed, name, global index)."""
        initialise(self.model, seed)

    def loaded(self) -> None:
        """To be called when parameters or state were filled from outside: copies of a tied table take over from the
        original."""
        copy_tied(self.model, {name: (item.step, item.first, item.second) for name, item in self.moments.items()})

    def release(self) -> None:
        """Lets go of the model, before another takes its place."""

    def weights(self) -> Mapping[str, Any]:
        """The masters as named tensors of global shape, for a checkpoint; a tied table's only where its original is."""
        return {name: item.detach() for name, item in self.parameters.items() if name not in self.copies}

    def checking_copy(self, precision: Precision) -> LanguageModel:
        """The model once more, computing in its masters' precision."""
        return checking_copy(self.model, precision)

    def accumulate(self, last: bool, scale: float, *inputs: Any) -> Tensor:
        """Adds the gradients of ``scale`` times the loss of a micro-batch; reduced over the ranks with the ``last``.

        Args:
            inputs: of the model's forward pass.

        Returns:
            The loss, unscaled.
        """
        synchronise_gradients(self.model, last)
        loss: Tensor = self.model(*inputs)
        (loss * scale).backward()
        return loss.detach()

    def complete_gradients(self) -> None:
        """What is left to be summed when all micro-batches have been: gradients of parts of a sequence."""
        sum_partial_gradients(self.model, self.grid)

    def _decays(self, name: str, optim: OptimConfig) -> bool:
        return optim.decay == "all" or self.specs[name].decay

    def _cut(self, model: LanguageModel, factors: Mapping[str, Factors]) -> dict[str, ShardFactors]:
        if unknown := sorted(factors.keys() - declarations(model.spec).keys()):
            raise ValueError(f"factors of parameters that the model does not have: {', '.join(unknown)}")
        cut = {}
        for name, spec in self.specs.items():
            shape = spec.shape(model.sizes)
            left = factors.get(self.copies.get(name, name))
            cut[name] = shard_factors(left, shape, my_bounds(spec, shape, self.grid), self.shards[name])
        return cut

    def _groups(self) -> list[dict[str, Any]]:
        """Parameters by what is the same for all their entries: rate, epsilon, decay, and whether they are new.

        Those with factors by entry lie in some group too, but never show it a gradient.
        """
        groups: dict[tuple[float, float, float, bool], dict[str, Any]] = {}
        for name, shard in self.shards.items():
            factors, decay = self.factors[name], self.decay[name]
            key = (factors.rate, factors.eps, decay, factors.age is Age.NEW)
            made = {
                "params": [],
                "weight_decay": decay / factors.rate,
                "eps": self.eps * factors.eps,
                "factors": factors,
            }
            groups.setdefault(key, made)["params"].append(shard)
        return list(groups.values())

    @torch.no_grad()
    def step(self, factor: float, after: After = NO_GROWTH) -> float:
        """Clips the gradients, updates the masters at ``factor`` of the peak rate, and forgets the gradients.

        Nothing is updated when the gradient is not finite. Gradients of what ``after`` lets rest count in the norm, so
        that it can be compared with the norms of other steps.

        Returns:
            The global gradient norm before clipping.
        """
        gradients = {name: local_tensor(item.grad) for name, item in self.parameters.items() if item.grad is not None}
        norm = self.gradient_norm(gradients)
        if self.clip and norm > self.clip:
            torch._foreach_mul_(list(gradients.values()), self.clip / (norm + 1e-6))
        if isfinite(norm):
            self._update(gradients, self.lr * factor, after)
        for name, item in self.parameters.items():
            item.grad = None
            self.shards[name].grad = None
        return norm

    def _update(self, gradients: Mapping[str, Tensor], lr: float, after: After) -> None:
        for name, gradient in gradients.items():
            factors = self.factors[name]
            if factors.rests(after):
                continue
            if factors.by_entry(after):
                settings = Settings(lr, self.betas, self.eps, self.decay[name], after)
                step_by_entry(self.shards[name], gradient, self.moments[name], factors, settings)
            else:
                self.shards[name].grad = gradient
        for group in self.inner.param_groups:
            group["lr"] = lr * group["factors"].rate * group["factors"].factor(after)
        self.inner.step()

    def gradient_norm(self, gradients: Mapping[str, Tensor]) -> float:
        """The norm over all parameters of all ranks; replicas over ``tp`` and both copies of a tied table count once.

        One collective of one number (``clip_grad_norm_`` on DTensors issues one per parameter).
        """
        counted = [
            gradient
            for name, gradient in gradients.items()
            if name not in self.copies and (self.grid.tp_rank == 0 or self.specs[name].tensor_parallel_dim is not None)
        ]
        squares = torch.zeros((), dtype=torch.float64, device=self.grid.device)
        if counted:
            norms = torch._foreach_norm(counted)
            squares = torch.stack([item.double() for item in norms]).square().sum()
        self.grid.sum(squares, "shard", "tp", "pp")
        return float(squares.sqrt())

    def reset(self) -> None:
        """Drops the moments and the step counts."""
        for state in self.moments.values():
            for item in (state.step, state.first, state.second):
                item.zero_()

    def tensors(self) -> dict[str, Tensor]:
        """The state as named tensors of global shape, for a checkpoint; a tied table's only where its original is."""
        out: dict[str, Tensor] = {}
        for name, state in self.moments.items():
            if name in self.copies:
                continue
            out[f"{name}.step"] = state.step
            out[f"{name}.exp_avg"] = _like(self.parameters[name], state.first)
            out[f"{name}.exp_avg_sq"] = _like(self.parameters[name], state.second)
        return out


def inner_optimizer(groups: list[dict[str, Any]], optim: OptimConfig, apex: bool) -> torch.optim.Optimizer:
    """What updates the parameters of ``groups``, each with its ``weight_decay`` and ``eps``: torch's fused AdamW or
    apex's."""
    if apex:
        return ApexAdamW(load_apex(), groups, optim.betas)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def _like(parameter: Tensor, local: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
