"""Grows a stored checkpoint block by block, without a model in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elle_mp.axes import ParamSpec
from elle_mp.checkpoint.store import CheckpointStore
from elle_mp.checkpoint.stream_reader import StoredTensors
from elle_mp.errors import UserError
from elle_mp.growth.apply import grown_norm_stats
from elle_mp.growth.blocks import Block, grow_moment, grow_weight
from elle_mp.growth.plan import GrowthPlan
from elle_mp.growth.tensors import TensorGrowth, parameter_growths
from elle_mp.ops.random import Bounds

Stored = Mapping[str, tuple[tuple[int, ...], torch.dtype]]

MODEL, OPTIM, NORM_STATS = "model.", "optim.", "model.norm_stats"
DEGREES = {"exp_avg": 1, "exp_avg_sq": 2}
STEP = "step"


@dataclass(frozen=True)
class OfflineGrowth:
    """The tensors of a grown checkpoint, and how each block of them is made.

    Attributes:
        plan: of the growth.
        source: the old checkpoint's tensors.
        specs: declarations of the larger model's parameters.
    """

    plan: GrowthPlan
    source: StoredTensors
    specs: Mapping[str, ParamSpec]

    def __post_init__(self) -> None:
        object.__setattr__(self, "_growths", parameter_growths(self.plan, self.specs))

    @property
    def growths(self) -> dict[str, TensorGrowth]:
        """The growth of every parameter, by name."""
        growths: dict[str, TensorGrowth] = vars(self)["_growths"]
        return growths

    def tensors(self) -> Stored:
        """Shape and type of every tensor of the new checkpoint, in the order of the model.

        Raises:
            UserError: the checkpoint lacks a tensor that the plan needs, or it has another shape.
        """
        out: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        optimizer = any(name.startswith(OPTIM) for name in self.source.tensors)
        master = self._dtype("token_table")
        for name, growth in self.growths.items():
            if growth.source is not None:
                self._check(MODEL + growth.source, growth.old_shape)
            out[MODEL + name] = (growth.shape, master)
        if self.plan.new.weighted_norms:
            out[NORM_STATS] = ((self.plan.new.embed,), torch.float64)
        for name, growth in self.growths.items() if optimizer else ():
            out[f"{OPTIM}{name}.{STEP}"] = ((), torch.float32)
            for moment in DEGREES:
                out[f"{OPTIM}{name}.{moment}"] = (growth.shape, master)
                if growth.source is not None and growth.moments != "reset":
                    self._check(f"{OPTIM}{growth.source}.{moment}", growth.old_shape)
        return out

    def produce(self, name: str, bounds: Bounds) -> Tensor:
        """A block of a tensor of the new checkpoint."""
        if name == NORM_STATS:
            return self._norm_stats()[bounds[0][0] : bounds[0][1]]
        if name.startswith(MODEL):
            growth = self.growths[name.removeprefix(MODEL)]
            out = self._empty(bounds)
            blocks = {key: self._read(MODEL + key, needed) for key, needed in growth.needs(bounds).items()}
            grow_weight(growth, blocks, bounds, out)
            return out
        parameter, _, moment = name.removeprefix(OPTIM).rpartition(".")
        growth = self.growths[parameter]
        fresh = growth.source is None or growth.moments == "reset"
        if moment == STEP:
            return torch.zeros(()) if fresh else self.source.read(f"{OPTIM}{growth.source}.{STEP}", ())
        out = self._empty(bounds)
        if fresh or growth.source is None:
            return out.zero_()
        block = self._read(f"{OPTIM}{growth.source}.{moment}", growth.needs(bounds)[growth.source])
        grow_moment(growth, block, bounds, out, DEGREES[moment])
        return out

    def _empty(self, bounds: Bounds) -> Tensor:
        return torch.empty([stop - start for start, stop in bounds], dtype=self._dtype("token_table"))

    def _dtype(self, name: str) -> torch.dtype:
        if MODEL + name not in self.source.tensors:
            raise UserError(f"the checkpoint holds no tensor {MODEL}{name}")
        return self.source.tensors[MODEL + name][1]

    def _read(self, name: str, bounds: Bounds) -> Block:
        return Block(self.source.read(name, bounds), bounds)

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self.source.tensors:
            raise UserError(f"the checkpoint holds no tensor {name} {list(shape)}; is the plan of another model?")
        have = tuple(self.source.tensors[name][0])
        if have != shape:
            raise UserError(f"the checkpoint's tensor {name} is {list(have)}, and the plan starts from {list(shape)}")

    def _norm_stats(self) -> Tensor:
        old = self.plan.old.embed
        if NORM_STATS in self.source.tensors:
            weights = self.source.read(NORM_STATS, ((0, old),))
        else:
            weights = torch.full((old,), 1.0 / old, dtype=torch.float64)
        return grown_norm_stats(self.plan, weights)


def grow_checkpoint(
    growth: OfflineGrowth,
    store: CheckpointStore,
    name: str,
    meta: Mapping[str, Any],
    block_bytes: int,
    progress: Callable[[int], None],
) -> None:
    """Writes the grown checkpoint ``name`` into ``store``; collective over the default process group, or alone.

    Args:
        block_bytes: of the largest block that is in memory at a time.
        progress: called with the bytes just written.

    Raises:
        UserError: the old checkpoint does not fit the plan, or the new one cannot be written; nothing of it is left.
    """
    store.save_streamed(
        name, growth.tensors(), growth.produce, meta, permanent=True, block_bytes=block_bytes, progress=progress
    )
