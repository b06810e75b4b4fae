"""AdamW by apex's fused kernel, with the state and the groups of ``torch.optim.AdamW``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from elle_mp.config import Config
from elle_mp.errors import UserError
from elle_mp.ops.apex import Apex, load_apex

DECOUPLED = 1
"""The kernel's mode in which decay is decoupled from the gradient (Loshchilov & Hutter, arXiv 1711.05101)."""


class ApexAdamW(torch.optim.Optimizer):
    """apex's multi-tensor Adam over parameters whose step counts may differ, as they do after a growth in depth.

    One launch updates all parameters of a group that have had as many updates. State is kept as torch's AdamW keeps
    it: ``step`` (a scalar tensor), ``exp_avg``, ``exp_avg_sq``.
    """

    def __init__(self, apex: Apex, groups: list[dict[str, Any]], betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": betas})
        self.apex = apex

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        for group in self.param_groups:
            for count, parameters in self._by_count(group["params"]).items():
                self._update(group, count + 1, parameters)

    def _by_count(self, parameters: list[Tensor]) -> dict[int, list[Tensor]]:
        having = [item for item in parameters if item.grad is not None]
        if not having:
            return {}
        counts = torch.stack([self.state[item]["step"] for item in having]).tolist()  # one copy from the device
        groups: dict[int, list[Tensor]] = {}
        for item, count in zip(having, counts, strict=True):
            groups.setdefault(int(count), []).append(item)
        return groups

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
        torch._foreach_add_([item["step"] for item in state], 1)


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
