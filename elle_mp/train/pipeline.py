"""Training through a pipeline: the schedules of ``torch.distributed.pipelining`` over this rank's stages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle
from torch.export import register_dataclass

from elle_mp.data.batches import Batch
from elle_mp.models.pipeline import Pipeline
from elle_mp.ops.dropout import DropoutKey

register_dataclass(DropoutKey)  # so that its samples are cut into micro-batches with everything else

SINGLE: dict[str, type[PipelineScheduleSingle]] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
"""One stage on a rank."""

MULTI: dict[str, type[PipelineScheduleMulti]] = {
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}
"""Several stages on a rank."""


class PipelineSchedule:
    """One step's forward and backward passes of all micro-batches, in the order of ``parallel.schedule``.

    GPipe: Huang et al., arXiv 1811.06965. 1F1B and its interleaved form: Narayanan et al., arXiv 2104.04473.
    Zero bubble and ZBV: Qi et al., arXiv 2401.10241.
    """

    def __init__(self, model: Pipeline, rows: int, text: int, count: int) -> None:
        """For steps of ``count`` micro-batches of ``rows`` sequences with ``text`` tokens each."""
        self.model = model
        self.shape = (rows, text, count)
        self.count = count
        self.scale = 1.0
        grid, name = model.grid, model.grid.parallel.schedule
        stages = [self._stage(index, rows, text) for index in grid.my_stages]
        options: dict[str, Any] = {"n_microbatches": count, "loss_fn": self._loss, "scale_grads": False}
        self.schedule: PipelineScheduleSingle | PipelineScheduleMulti
        if name in SINGLE:
            self.schedule = SINGLE[name](stages[0], **options)
        else:
            self.schedule = MULTI[name](list(stages), **options)

    def step(self, batch: Batch, scale: float, dropout_seed: int) -> Tensor:
        """Adds the gradients of ``scale`` times the loss of the whole batch to those that there are.

        Returns:
            The sum of the losses over all targets (fp64 scalar), on the rank of the last stage; zero elsewhere.
        """
        self.scale = scale
        losses: list[Tensor] = []
        inputs = (batch.tokens,) if self.model.grid.rank("pp") == self.model.grid.rank_of_stage(0) else ()
        key = DropoutKey(dropout_seed, batch.key)
        shared: dict[str, Any] = {"domain": batch.domain, "targets": batch.targets, "key": key}
        last: dict[str, Any] = {"target": batch.targets, "losses": losses} if self.model.has_last else {}
        self.schedule.step(*inputs, return_outputs=False, **last, **shared)
        total = torch.zeros((), dtype=torch.float64, device=self.model.grid.device)
        for loss in losses:
            total += loss.detach().double() / scale
        return total

    def _loss(self, output: Tensor, targets: Tensor) -> Tensor:
        return output * self.scale

    def _stage(self, index: int, rows: int, text: int) -> PipelineStage:
        model = self.model
        part, grid = model.my_parts[index], model.grid
        # Said here, shapes need not be found out by a first pass; what wants a gradient gets one.
        hidden = torch.empty(
            model.hidden_shape(rows, text), dtype=model.compute_dtype, device="meta", requires_grad=True
        )
        tokens = torch.empty(rows, text, dtype=torch.int64, device="meta")
        wide = torch.promote_types(model.compute_dtype, torch.float32)
        loss = torch.empty((), dtype=wide, device="meta", requires_grad=True)
        return PipelineStage(
            part,
            index,
            grid.pipeline_stages,
            grid.device,
            input_args=(tokens if part.part.first else hidden,),
            output_args=(loss if part.part.last else hidden,),
            group=grid.group("pp"),
        )
