"""AdamW by apex's fused kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from elle_mp.config import Config
from elle_mp.errors import UserError
from elle_mp.ops.apex import Apex, load_apex
from elle_mp.train.kernel_adam import KernelAdamW

DECOUPLED = 1
"""The kernel's mode in which decay is decoupled from the gradient (Loshchilov & Hutter, arXiv 1711.05101)."""


class ApexAdamW(KernelAdamW):
    """apex's multi-tensor Adam: one launch updates all parameters of a group that have had as many updates."""

    def __init__(self, apex: Apex, groups: list[dict[str, Any]], betas: tuple[float, float]) -> None:
        super().__init__(groups, betas)
        self.apex = apex

    def _update(self, group: dict[str, Any], step: int, parameters: list[Tensor]) -> None:
        state = [self.state[item] for item in parameters]
        overflow = torch.zeros(1, dtype=torch.int32, device=parameters[0].device)
        first, second = group["betas"]
        self.apex.apply(
            self.apex.adam,
            overflow,
            [
                [item.grad for item in parameters],
                parameters,
                [item["exp_avg"] for item in state],
                [item["exp_avg_sq"] for item in state],
            ],
            group["lr"],
            first,
            second,
            group["eps"],
            step,
            DECOUPLED,
            1,  # bias correction
            group["weight_decay"],
        )


def check_apex(config: Config) -> None:
    """Refuses ``parallel.apex`` where it cannot run, before anything does.

    Raises:
        UserError: apex is not there, or no GPU is.
    """
    if not any(config.stage_parallel(index).apex for index in range(len(config.stream))):
        return
    load_apex()
    if not torch.cuda.is_available():
        raise UserError("parallel.apex=true, but no GPU is visible, where its kernels run; leave parallel.apex out")
