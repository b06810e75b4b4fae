"""One training step: micro-batches, gradients summed over all targets of the global batch, AdamW."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from elle_mp.data.batches import Batch
from elle_mp.errors import UserError
from elle_mp.growth.factors import After
from elle_mp.models.pipeline import LanguageModel, Pipeline, add_tied_gradients
from elle_mp.models.transformer import IGNORED
from elle_mp.ops.dropout import DropoutKey
from elle_mp.parallel.mesh import Grid
from elle_mp.train.optimizer import NO_GROWTH, ShardedAdamW
from elle_mp.train.pipeline import PipelineSchedule


@dataclass(frozen=True)
class StepResult:
    """What one step did.

    Attributes:
        loss: mean cross entropy over the targets of the global batch, before the update.
        grad_norm: global norm before clipping.
        targets: predicted positions of the global batch.
        stop: some rank was asked to stop.
    """

    loss: float
    grad_norm: float
    targets: int
    stop: bool


def rows_of(grid: Grid, global_batch: int) -> tuple[int, int]:
    """The rows of a global batch that this rank trains on."""
    share = global_batch // grid.dp_size
    return grid.dp_rank * share, (grid.dp_rank + 1) * share


class Trainer:
    """Trains a model on the rows of this rank."""

    def __init__(self, model: LanguageModel, optimizer: ShardedAdamW, micro: int, dropout_seed: int) -> None:
        self.model = model
        self.optimizer = optimizer
        self.micro = micro
        self.dropout_seed = dropout_seed
        self.schedule: PipelineSchedule | None = None

    def step(
        self, batch: Batch, factor: float, stop: Callable[[], bool] = lambda: False, after: After = NO_GROWTH
    ) -> StepResult:
        """One update from this rank's rows of the global batch, at ``factor`` of the peak rate.

        ``after`` says what distinguishes old entries from new ones.

        The loss is the sum over all targets of all ranks divided by their number, so uneven ranks and micro-batches
        weigh every target the same. ``stop`` is agreed on by all ranks, in the same collective as the number.

        Raises:
            UserError: the loss or the gradient is not finite; nothing was updated.
        """
        grid, device = self.model.grid, self.model.grid.device
        batch = batch.to(device)
        counts = torch.zeros(2, dtype=torch.float64, device=device)
        alone = grid.tp_rank == grid.rank("pp") == grid.rank("cp") == 0  # of the ranks that have this batch
        counts[0] = int((batch.targets != IGNORED).sum()) if alone else 0
        counts[1] = float(stop())
        dist.all_reduce(counts, group=grid.everyone)
        targets, stopping = int(counts[0]), counts[1] > 0
        # FSDP2 averages gradients over the ranks that share or repeat parameters; this makes it a sum over all targets.
        scale = grid.dp_size * grid.size("cp") / max(targets, 1)
        total = self._gradients(batch, scale)
        self.optimizer.complete_gradients()
        grid.sum(total, "dp_replicate", "shard", "pp")
        mean = float(total) / max(targets, 1)
        norm = self.optimizer.step(factor, after)
        return StepResult(mean, norm, targets, bool(stopping))

    def _gradients(self, batch: Batch, scale: float) -> Tensor:
        """Forward and backward of all micro-batches; the sum of this rank's losses (fp64 scalar), unscaled."""
        if isinstance(self.model, Pipeline):
            return self._through_pipeline(self.model, batch, scale)
        total = torch.zeros((), dtype=torch.float64, device=self.model.grid.device)
        pieces = [batch.rows(first, first + self.micro) for first in range(0, len(batch), self.micro)]
        for index, piece in enumerate(pieces):
            key = DropoutKey(self.dropout_seed, piece.key)
            inputs = piece.tokens, piece.domain, piece.targets, key
            total += self.optimizer.accumulate(index == len(pieces) - 1, scale, *inputs)
        return total

    def _through_pipeline(self, model: Pipeline, batch: Batch, scale: float) -> Tensor:
        rows = min(self.micro, len(batch))
        shape = (rows, batch.tokens.shape[1], len(batch) // rows)
        if self.schedule is None or self.schedule.shape != shape:
            self.schedule = PipelineSchedule(model, *shape)
        total = self.schedule.step(batch, scale, self.dropout_seed)
        add_tied_gradients(model)
        return total


def check_finite(result: StepResult, where: str) -> None:
    """Stops a run that has diverged.

    Raises:
        UserError: loss or gradient norm is not finite.
    """
    if not (abs(result.loss) < float("inf") and result.grad_norm < float("inf")):
        raise UserError(
            f"{where}: loss {result.loss} and gradient norm {result.grad_norm} are not finite; "
            "the last checkpoint is intact: lower optim.lr or raise optim.warmup"
        )
