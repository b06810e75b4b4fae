"""AdamW on the shards of DeepSpeed's ZeRO, with the face of the optimizer over FSDP2's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from elle_mp.axes import ParamSpec
from elle_mp.checkpoint.shards import Blocks
from elle_mp.config import OptimConfig
from elle_mp.errors import UserError
from elle_mp.growth.apply import Moments, Traffic, grow_on_shards
from elle_mp.growth.factors import After, Factors
from elle_mp.growth.plan import GrowthPlan
from elle_mp.models.build import Precision, empty_model
from elle_mp.models.declarations import declarations
from elle_mp.models.pipeline import LanguageModel
from elle_mp.models.spec import ModelSpec
from elle_mp.models.transformer import Transformer
from elle_mp.ops.random import Bounds, normal_block
from elle_mp.parallel.deepspeed import (
    check_grid,
    data_parallel_group,
    masters,
    publish,
    run_of,
    start_engine,
    stop_engine,
)
from elle_mp.parallel.fragments import Piece, block_of, pieces_of, take
from elle_mp.parallel.mesh import Grid
from elle_mp.parallel.sequence import partial_parameters
from elle_mp.parallel.sharding import local_tensor, my_bounds, named_specs
from elle_mp.train.cpu_adam import CpuAdamW, agreed_kernel
from elle_mp.train.entries import ShardFactors, shard_factors
from elle_mp.train.optimizer import NO_GROWTH, ShardedAdamW, inner_optimizer

WEIGHT, FIRST, SECOND = "weight", "exp_avg", "exp_avg_sq"
"""What ZeRO shards of every parameter."""

Key = tuple[str, int]
"""A parameter's name and the number of one of this rank's pieces of it."""


def hollow_model(spec: ModelSpec, grid: Grid, precision: Precision) -> Transformer:
    """A model for :class:`ZeroAdamW`: its parameters have no memory yet, so that no rank ever holds all of them."""
    with torch.device("meta"):
        model = Transformer(spec, grid, precision.compute)
    if spec.weighted_norms:
        model.norm_stats = torch.full((spec.embed,), 1.0 / spec.embed, dtype=torch.float64, device=grid.device)
    return model


class ZeroAdamW(ShardedAdamW):
    """:class:`ShardedAdamW` where DeepSpeed shards: ZeRO reduces the gradients, cuts them, and gathers the parameters;
    the step in between is the same, on the pieces that ZeRO leaves to this rank.

    It takes the model over. Values come from :meth:`initialise`, from a checkpoint (:meth:`tensors`,
    :attr:`parameters`; then :meth:`loaded`), or from shards (:meth:`take_from`). Training goes through :meth:`forward`
    and :meth:`backward`.

    Args:
        model: of :func:`hollow_model`, on a grid whose engine is ``deepspeed``.
        factors: as of :class:`ShardedAdamW`.

    Attributes:
        parameters: the fp32 masters by name, in pieces.

    Raises:
        UserError: DeepSpeed is missing, or cannot run this layout or precision.
    """

    parameters: dict[str, Blocks]  # type: ignore[assignment]

    def __init__(self, model: Transformer, optim: OptimConfig, factors: Mapping[str, Factors] | None = None) -> None:
        self.grid: Grid = model.grid
        check_grid(self.grid)
        if model.token_table.dtype == torch.float64:
            raise UserError("parallel.engine: deepspeed keeps fp32 masters; precision: fp64 needs engine=fsdp")
        self.model = model
        self.specs: Mapping[str, ParamSpec] = dict(named_specs(model))
        self.copies: Mapping[str, str] = {}
        self.shapes = {name: spec.shape(model.sizes) for name, spec in self.specs.items()}
        self.lr, self.clip, self.betas, self.eps = optim.lr, optim.clip, optim.betas, optim.eps
        self.group = data_parallel_group(self.grid)
        self.partial = frozenset(partial_parameters(self.specs, self.grid))
        self.engine = start_engine(model, lambda items: _Handle(items, self._step_pieces), self.grid, self.group)
        self.cpu_adam = agreed_kernel()[0] if self.grid.parallel.cpu_adam == "deepspeed" else None
        self._find_pieces(optim, factors or {})
        self.now: tuple[float, After] = (0.0, NO_GROWTH)
        self.norm = 0.0

    def _find_pieces(self, optim: OptimConfig, factors: Mapping[str, Factors]) -> None:
        if unknown := sorted(factors.keys() - declarations(self.model.spec).keys()):
            raise ValueError(f"factors of parameters that the model does not have: {', '.join(unknown)}")
        self.flat = masters(self.engine).detach()
        flats = {WEIGHT: self.flat, FIRST: torch.zeros_like(self.flat), SECOND: torch.zeros_like(self.flat)}
        self.pieces: dict[str, dict[str, list[Piece]]] = {kind: {} for kind in flats}
        self.steps: dict[str, Tensor] = {}
        self.ages: dict[str, ShardFactors] = {}
        self.offsets: list[int] = []
        for name, parameter in self.model.named_parameters():
            run = run_of(self.engine, parameter)
            for kind, flat in flats.items():
                part = flat.narrow(0, run.offset, run.length)
                self.pieces[kind][name] = pieces_of(part, self._local(name), run.start)
            self.steps[name] = torch.zeros((), dtype=torch.float32, device=self.flat.device)
            nothing = ((0, 0),) * len(self.shapes[name])
            self.ages[name] = shard_factors(factors.get(name), self.shapes[name], nothing, self.flat)
            self.offsets += [
                run.offset + sum(piece.values.numel() for piece in self.pieces[WEIGHT][name][:number])
                for number in range(len(self.pieces[WEIGHT][name]))
            ]
        self.parameters = {name: self._blocks(name, WEIGHT) for name in self.pieces[WEIGHT]}
        self._set_up_pieces(optim, factors)

    def _set_up_pieces(self, optim: OptimConfig, factors: Mapping[str, Factors]) -> None:
        """The tables that the step works by, of pieces in the place of shards."""
        self.shards: dict[Any, Tensor] = {}
        self.moments: dict[Any, Moments] = {}
        self.factors: dict[Any, ShardFactors] = {}
        self.decay: dict[Any, float] = {}
        for key, weight in self._keys():
            name, number = key
            self.shards[key] = weight.values
            self.moments[key] = Moments(
                torch.zeros_like(self.steps[name]),
                self.pieces[FIRST][name][number].values,
                self.pieces[SECOND][name][number].values,
            )
            self.factors[key] = shard_factors(factors.get(name), self.shapes[name], weight.bounds, weight.values)
            self.decay[key] = optim.weight_decay if self._decays(name, optim) else 0.0
        groups = self._groups() or [{"params": []}]
        if self.cpu_adam is not None:
            self.inner = CpuAdamW(self.cpu_adam, groups, optim.betas)
        else:
            self.inner = inner_optimizer(groups, optim, self.grid.parallel.apex)
        for key, state in self.moments.items():
            self.inner.state[self.shards[key]] = {
                "step": state.step,
                "exp_avg": state.first,
                "exp_avg_sq": state.second,
            }

    def _keys(self) -> Iterator[tuple[Key, Piece]]:
        for name, pieces in self.pieces[WEIGHT].items():
            for number, piece in enumerate(pieces):
                yield (name, number), piece

    def _local(self, name: str) -> Bounds:
        """The block that this rank computes with."""
        return my_bounds(self.specs[name], self.shapes[name], self.grid)

    def _blocks(self, name: str, kind: str) -> Blocks:
        held = {tuple(start for start, _ in piece.bounds): piece.values for piece in self.pieces[kind][name]}
        return Blocks(self.shapes[name], self.flat.dtype, held)

    # Training

    def forward(self, *inputs: Any) -> Tensor:
        """The model, for a micro-batch whose gradients are wanted; evaluation may call the model itself."""
        out: Tensor = self.engine(*inputs)
        return out

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of ``loss`` (already scaled) to those that there are; ZeRO averages them over the
        data-parallel ranks, now (stages 2 and 3) or in the step."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def accumulate(self, last: bool, scale: float, *inputs: Any) -> Tensor:
        """As of :class:`ShardedAdamW`."""
        loss = self.forward(*inputs)
        self.backward(loss * scale)
        return loss.detach()

    def complete_gradients(self) -> None:
        """Nothing: :meth:`step` sums the gradients of parts of a sequence, on pieces."""

    def step(self, factor: float, after: After = NO_GROWTH) -> float:
        """As of :class:`ShardedAdamW`."""
        self.now, self.norm = (factor, after), float("inf")
        self.engine.step()  # ZeRO does not come back to _step_pieces when the gradient is not finite
        return self.norm

    @torch.no_grad()
    def _step_pieces(self, flat: Tensor) -> None:
        """The step proper, in the middle of ZeRO's: ``flat`` is this rank's part of the summed gradient."""
        factor, after = self.now
        gradients: dict[Any, Tensor] = {
            key: flat.narrow(0, offset, shard.numel()).view(shard.shape)
            for (key, shard), offset in zip(self.shards.items(), self.offsets, strict=True)
        }
        self._complete([gradients[key] for key in gradients if key[0] in self.partial])
        self.norm = self.gradient_norm(gradients)
        if self.clip and self.norm > self.clip:
            flat.mul_(self.clip / (self.norm + 1e-6))
        if not isfinite(self.norm):
            return
        self._update(gradients, self.lr * factor, after)
        for shard in self.shards.values():
            shard.grad = None
        moved = [step for name, step in self.steps.items() if not self.ages[name].rests(after)]
        if moved:
            torch._foreach_add_(moved, 1.0)

    def _complete(self, gradients: list[Tensor]) -> None:
        """Sums over the tensor-parallel ranks, whose pieces are the same, what each has of its own positions only."""
        if gradients:
            flat = torch.cat([item.flatten() for item in gradients])
            self.grid.sum(flat, "tp")
            parts = flat.split([item.numel() for item in gradients])
            torch._foreach_copy_(
                gradients, [part.view(item.shape) for part, item in zip(parts, gradients, strict=True)]
            )

    def gradient_norm(self, gradients: Mapping[Any, Tensor]) -> float:
        """As of :class:`ShardedAdamW`; ZeRO shards over the replicas, too."""
        counted = [
            gradient
            for (name, _), gradient in gradients.items()
            if self.grid.tp_rank == 0 or self.specs[name].tensor_parallel_dim is not None
        ]
        squares = torch.zeros((), dtype=torch.float64, device=self.grid.device)
        if counted:
            squares += torch.stack([item.double() for item in torch._foreach_norm(counted)]).square().sum()
        self.grid.sum(squares, "dp_replicate", "shard", "tp")
        return float(squares.sqrt())

    # State

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Fills every parameter by (seed, name, global index), as :func:`elle_mp.parallel.sharding.initialise` does."""
        for (name, _), piece in self._keys():
            spec = self.specs[name]
            if spec.std is None:
                piece.values.fill_(spec.value)
            else:
                block = normal_block(seed, f"init/{name}", self.shapes[name], piece.bounds, piece.values.dtype)
                piece.values.copy_(block.mul_(spec.std))
        self.loaded()

    @torch.no_grad()
    def loaded(self) -> None:
        """To be called when masters or state were filled from outside: the model computes with them from now on."""
        for (name, _), state in self.moments.items():
            state.step.copy_(self.steps[name])
        publish(self.engine)

    def release(self) -> None:
        """Lets go of the model and all state, before a larger model takes their place. Nothing works afterwards."""
        stop_engine(self.engine, self.model)
        for table in (self.pieces, self.shards, self.moments, self.parameters, self.inner.state):
            table.clear()
        self.inner.param_groups.clear()

    def reset(self) -> None:
        """Drops the moments and the step counts."""
        super().reset()
        for step in self.steps.values():
            step.zero_()

    def weights(self) -> Mapping[str, Tensor | Blocks]:
        """The masters, in pieces."""
        return self.parameters

    def checking_copy(self, precision: Precision) -> LanguageModel:
        """As of :class:`ShardedAdamW`, on FSDP2's shards."""
        return sharded_twin(self, precision).eval()

    def tensors(self) -> dict[str, Tensor | Blocks]:  # type: ignore[override]
        """The state as named tensors of global shape, for a checkpoint: this rank's pieces, where they lie."""
        out: dict[str, Tensor | Blocks] = {}
        for name, step in self.steps.items():
            out[f"{name}.step"] = step
            for kind in (FIRST, SECOND):
                out[f"{name}.{kind}"] = self._blocks(name, kind)
        return out

    # From and to FSDP2's shards, one tensor at a time

    @torch.no_grad()
    def give_to(self, model: Transformer, moments: Mapping[str, Moments] | None = None) -> None:
        """Fills a model of the same spec and tensor-parallel layout on FSDP2's shards, and its moments. Collective."""
        for name, parameter in model.named_parameters():
            self._give(name, WEIGHT, local_tensor(parameter), model.grid)
            if moments is not None:
                state = moments[name]
                self._give(name, FIRST, state.first, model.grid)
                self._give(name, SECOND, state.second, model.grid)
                state.step.copy_(self.steps[name])

    @torch.no_grad()
    def take_from(self, model: Transformer, moments: Mapping[str, Moments]) -> None:
        """The reverse of :meth:`give_to`."""
        for name, parameter in model.named_parameters():
            state = moments[name]
            for kind, shard in ((WEIGHT, local_tensor(parameter)), (FIRST, state.first), (SECOND, state.second)):
                local = self._local(name)
                held = Piece(my_bounds(self.specs[name], self.shapes[name], model.grid), shard)
                block = block_of([held], local, shard, model.grid.group("shard"))
                take(block, local, self.pieces[kind][name])
            self.steps[name].copy_(state.step)
        self.loaded()

    def _give(self, name: str, kind: str, shard: Tensor, grid: Grid) -> None:
        local = self._local(name)
        block = block_of(self.pieces[kind][name], local, self.flat, self.group)
        take(block, local, [Piece(my_bounds(self.specs[name], self.shapes[name], grid), shard)])


def sharded_twin(optimizer: ZeroAdamW, precision: Precision) -> Transformer:
    """A model with the same values on FSDP2's shards, computing in the masters' precision: what growth maps, and what
    is measured and proved (:func:`elle_mp.models.build.checking_copy`). Collective."""
    source, grid = optimizer.model, optimizer.grid
    plain = replace(grid, parallel=grid.parallel.model_copy(update={"engine": "fsdp"}))
    twin = empty_model(source.spec, plain, precision.checking)
    if not isinstance(twin, Transformer):
        raise RuntimeError("a pipeline has no twin")
    optimizer.give_to(twin)
    if twin.norm_stats is not None and source.norm_stats is not None:
        twin.norm_stats.copy_(source.norm_stats)
    return twin


def grow_zero(
    plan: GrowthPlan,
    optimizer: ZeroAdamW,
    optim: OptimConfig,
    factors: Mapping[str, Factors] | None,
    precision: Precision,
) -> tuple[ZeroAdamW, Traffic]:
    """Applies a plan on FSDP2's shards; ``optimizer`` and its model are released. Collective.

    Returns:
        The larger model's optimizer (its ``model`` is the model), and what was sent between shards.
    """
    small = sharded_twin(optimizer, precision)
    state = ShardedAdamW(small, optim)
    optimizer.give_to(small, state.moments)
    optimizer.release()
    large = empty_model(plan.new, small.grid, precision.checking)
    if not isinstance(large, Transformer):
        raise RuntimeError("a pipeline under DeepSpeed")
    larger_state = ShardedAdamW(large, optim)
    traffic = grow_on_shards(plan, small, large, state.moments, larger_state.moments)
    del small, state
    model = hollow_model(plan.new, optimizer.grid, precision)
    if model.norm_stats is not None and large.norm_stats is not None:
        model.norm_stats.copy_(large.norm_stats)
    grown = ZeroAdamW(model, optim, factors)
    grown.take_from(large, larger_state.moments)
    return grown, traffic


class _Handle(torch.optim.Optimizer):
    """What DeepSpeed takes for the optimizer: it hands this rank's part of the gradient on."""

    def __init__(self, parameters: list[torch.nn.Parameter], step: Callable[[Tensor], None]) -> None:
        super().__init__(parameters, {"lr": 0.0})
        self.step_pieces = step

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Called by ZeRO, with one flat parameter."""
        (flat,) = self.param_groups[0]["params"]
        self.step_pieces(flat.grad)
