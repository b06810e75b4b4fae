"""Twenty steps with a growth in the middle under any layout, held against one process entry by entry.

One process leaves all that it computed in a file. The ranks of a layout compare their own parts with it, without any
collective of their own: losses, norms, every gradient before clipping, what growth made of weights and moments, and the
weights at the end. That covers both engines, since FSDP2's shards and ZeRO's pieces all know their place in the whole.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from elle_mp.config import OptimConfig
from elle_mp.data.batches import Batch
from elle_mp.growth.rates import factors_of
from elle_mp.models.build import Precision
from elle_mp.models.declarations import declarations
from elle_mp.models.transformer import IGNORED
from elle_mp.ops.random import Bounds, normal_block
from elle_mp.parallel.deepspeed import give_back_linear, load_deepspeed
from elle_mp.parallel.mesh import Grid
from elle_mp.parallel.pipeline import Costs
from elle_mp.parallel.sharding import my_bounds
from elle_mp.train.deepspeed import WEIGHT, ZeroAdamW
from elle_mp.train.engine import grow_optimizer, make_optimizer
from elle_mp.train.optimizer import ShardedAdamW
from elle_mp.train.trainer import Trainer, rows_of
from tests.tiny import TEXT, config_of, grid, plan_of, spec_of, text

ROWS, STEPS = 4, 10
GROW = {"heads": 6, "mlp": 60}
"""And a layer."""
# Clipped in some steps and not in others; the epsilon keeps Adam from making much of rounding.
OPTIM = OptimConfig(lr=1e-2, betas=(0.9, 0.98), eps=1e-3, weight_decay=0.1, clip=1.0)
MEASURED = Costs(1.0, 0.0, 9.0), Costs(1.0, 9.0, 0.0)
"""What a split is measured by, before the growth and after it: four layers become 3 + 1, and five 1 + 4."""
HALF_ULP = 2.0**-9
"""Of bf16, relative."""

Parts = Mapping[str, list[tuple[Bounds, Tensor]]]
"""This rank's parts of tensors by their names in the whole model, and where they lie."""


def global_batch(step: int) -> Batch:
    """Targets unevenly spread over ranks, micro-batches and positions: the first row predicts one position, the next
    only early ones, the last not every one, and in every third step the first half (a rank of two) none at all."""
    tokens, domain, targets = text(ROWS, seed=step)
    targets[0, 1:] = IGNORED
    targets[1, TEXT // 2 :] = IGNORED
    targets[3, ::3] = IGNORED
    if step % 3 == 0:
        targets[: ROWS // 2] = IGNORED
    return Batch(tokens, targets, domain, torch.arange(ROWS) + ROWS * step)


def forget_deepspeed() -> None:
    """Lets DeepSpeed, which keeps the process groups of the pool's last call and numbers modules and parameters from
    there, start anew: some processes of the pool have seen more of them than others."""
    deepspeed = load_deepspeed()
    offload = importlib.import_module("deepspeed.runtime.zero.parameter_offload").DeepSpeedZeRoOffload
    offload._register_deepspeed_module.__defaults__[0][0] = 0
    deepspeed.zero.Init.param_id = 0
    deepspeed.comm.comm.cdb = None
    deepspeed.utils.groups.mpu = None
    deepspeed.utils.groups._WORLD_GROUP = None
    give_back_linear()


def fresh_grid(layout: Mapping[str, Any]) -> Grid:
    """A grid, whatever ran before in this process."""
    if layout.get("engine") == "deepspeed":
        forget_deepspeed()
    return grid(**layout)


def place_of(optimizer: ShardedAdamW, key: Any) -> tuple[str, Bounds]:
    """Whose part a shard or piece of the optimizer is, and where it lies. A copy of a tied table is the table."""
    if isinstance(optimizer, ZeroAdamW):
        name, number = key
        return name, optimizer.pieces[WEIGHT][name][number].bounds
    shape = optimizer.specs[key].shape(optimizer.model.sizes)
    return optimizer.copies.get(key, key), my_bounds(optimizer.specs[key], shape, optimizer.grid)


def parts(optimizer: ShardedAdamW, tensors: Mapping[Any, Tensor]) -> Parts:
    """This rank's tensors, by the optimizer's keys, in their places."""
    out: dict[str, list[tuple[Bounds, Tensor]]] = {}
    for key, tensor in tensors.items():
        name, bounds = place_of(optimizer, key)
        out.setdefault(name, []).append((bounds, tensor.detach()))
    return out


def state_of(optimizer: ShardedAdamW) -> Iterator[tuple[str, Parts]]:
    """Weights and moments."""
    yield "weight", parts(optimizer, optimizer.shards)
    yield "first", parts(optimizer, {key: state.first for key, state in optimizer.moments.items()})
    yield "second", parts(optimizer, {key: state.second for key, state in optimizer.moments.items()})


@torch.no_grad()
def scatter(optimizer: ShardedAdamW, jitter: int) -> None:
    """Moves every parameter away from its initial value: no bias is zero, no gain one. ``jitter`` is the seed of
    changes that bf16 rounds away, or does not: two of them differ as two roundings do."""
    for key, shard in optimizer.shards.items():
        name, bounds = place_of(optimizer, key)
        shape = optimizer.specs[key if isinstance(key, str) else name].shape(optimizer.model.sizes)
        shard.add_(normal_block(2, f"test/{name}", shape, bounds, shard.dtype), alpha=0.05)
        if jitter:
            noise = normal_block(jitter, f"jitter/{name}", shape, bounds, shard.dtype).clamp_(-1.0, 1.0)
            shard.mul_(1.0 + HALF_ULP * noise)
    optimizer.loaded()


class Reference:
    """What one process computed, as it goes along: to be kept, or to be compared with."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def see(self, what: str, found: Parts) -> None:
        """Keeps whole tensors."""
        for name, ((bounds, tensor),) in found.items():
            assert all(start == 0 for start, _ in bounds)
            self.tensors[f"{what}/{name}"] = tensor.clone()


class Comparison(Reference):
    """Compares a rank's parts with the reference.

    Attributes:
        worst: by kind (``gradient``, ``weight``, ...), the largest difference relative to the tensor's largest entry,
            and where it is.
        held: by kind, which blocks of which tensors have been compared: of the last step that saw them.
    """

    def __init__(self, wanted: Mapping[str, Tensor]) -> None:
        self.wanted = wanted
        self.worst: dict[str, tuple[float, str]] = {}
        self.held: dict[str, dict[str, set[Bounds]]] = {}

    def see(self, what: str, found: Parts) -> None:
        """Compares; tensors that are not there are zero (a gradient that nothing asked for)."""
        kind = what.split("/")[0]
        held: dict[str, set[Bounds]] = {}
        whole = {key: tensor for key, tensor in self.wanted.items() if key.startswith(f"{what}/")}
        # What has no gradient but rounding (behind a layer that is new and writes zeros) counts by the others.
        floor = 1e-3 * max(float(tensor.abs().max()) for tensor in whole.values())
        for name, blocks in found.items():
            wanted = whole.get(f"{what}/{name}")
            largest = floor if wanted is None else max(float(wanted.abs().max()), floor)
            for bounds, tensor in blocks:
                held.setdefault(name, set()).add(bounds)
                nothing = torch.zeros_like(tensor)
                part = nothing if wanted is None else wanted[tuple(slice(*span) for span in bounds)]
                assert part.shape == tensor.shape, name
                if tensor.numel():
                    difference = float((tensor - part).abs().max()) / largest
                    self.worst[kind] = max(self.worst.get(kind, (0.0, "")), (difference, f"{what}/{name}"))
        self.held[kind] = held


@dataclass
class Trained:
    """What a rank tells of its run.

    Attributes:
        losses, norms: of every step.
        worst, held: as of :class:`Comparison`.
        layers: of this rank's parts, before and after the growth.
        received: bytes, in the growth.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    worst: dict[str, tuple[float, str]] = field(default_factory=dict)
    held: dict[str, dict[str, set[Bounds]]] = field(default_factory=dict)
    layers: list[list[list[int]]] = field(default_factory=list)
    received: int = 0


@dataclass(frozen=True)
class Setting:
    """What is trained: the same under every layout."""

    family: str
    precision: str
    layers: int


def train(setting: Setting, layout: Mapping[str, Any], seen: Reference, jitter: int = 0) -> Trained:
    """The twenty steps; the growth is the family's own, noise included."""
    place, kind, out = fresh_grid(layout), Precision.named(setting.precision), Trained()
    before, after = MEASURED if layout.get("split") == "measured" else (None, None)
    place = replace(place, costs=before)
    sizes = {"dropout": 0.1, "layers": setting.layers}
    optimizer = make_optimizer(spec_of(setting.family, **sizes), place, kind, OPTIM)
    optimizer.initialise(1)
    scatter(optimizer, jitter)
    first, last = rows_of(place, ROWS)
    # Ranks that see all rows take two at a time, so that each has two micro-batches or, in a pipeline, four.
    micro = 2 if place.dp_size == place.size("pp") == 1 else 1
    for step in range(2 * STEPS):
        if step % STEPS == 0:
            if step:
                grow = GROW | {"layers": setting.layers + 1}
                plan, _ = plan_of(optimizer.model.spec, config_of(setting.family, **sizes).model, grow)
                factors = factors_of([plan], declarations)
                optimizer, traffic = grow_optimizer(plan, optimizer, kind, OPTIM, factors, after)
                out.received = traffic.received
                for what, state in state_of(optimizer):
                    seen.see(f"grown {what}", state)
            trainer = Trainer(optimizer.model, optimizer, micro, dropout_seed=3)
            out.layers.append([list(part.part.layers) for part in optimizer.model.parts])
        watch_gradients(optimizer, seen, step)
        result = trainer.step(global_batch(step).rows(first, last), 1.0)
        out.losses.append(result.loss)
        out.norms.append(result.grad_norm)
    seen.see("weight", parts(optimizer, optimizer.shards))
    optimizer.release()
    return out


def watch_gradients(optimizer: ShardedAdamW, seen: Reference, step: int) -> None:
    """Shows the gradients of the next step, complete and unclipped, where the optimizer asks for their norm."""

    def watching(gradients: Mapping[Any, Tensor]) -> float:
        vars(optimizer).pop("gradient_norm")
        seen.see(f"gradient/{step}", parts(optimizer, gradients))
        return optimizer.gradient_norm(gradients)

    optimizer.gradient_norm = watching  # type: ignore[method-assign]


def keep(file: str, setting: Setting, jitter: int) -> None:
    """One process's run, in a file."""
    seen = Reference()
    trained = train(setting, {}, seen, jitter)
    torch.save({"tensors": seen.tensors, "losses": trained.losses, "norms": trained.norms}, file)


def compare(runs: list[tuple[Setting, dict[str, Any], str]]) -> list[Trained]:
    """What this rank tells of runs, one after the other, each held against the file of one process."""
    out = []
    for setting, layout, file in runs:
        print(setting, layout, flush=True)  # to be seen should it hang
        seen = Comparison(torch.load(file, mmap=True, weights_only=False)["tensors"])
        trained = train(setting, layout, seen)
        trained.worst, trained.held = seen.worst, seen.held
        out.append(trained)
    return out
