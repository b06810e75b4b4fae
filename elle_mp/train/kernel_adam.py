"""AdamW by another library's kernel, with the state and the groups of ``torch.optim.AdamW``."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor


class KernelAdamW(torch.optim.Optimizer):
    """Adam over parameters whose step counts may differ, as they do after a growth in depth.

    State is kept as torch's AdamW keeps it: ``step`` (a scalar tensor), ``exp_avg``, ``exp_avg_sq``.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        for group in self.param_groups:
            for count, parameters in self._by_count(group["params"]).items():
                self._update(group, count + 1, parameters)
                torch._foreach_add_([self.state[item]["step"] for item in parameters], 1)

    def _by_count(self, parameters: list[Tensor]) -> dict[int, list[Tensor]]:
        having = [item for item in parameters if item.grad is not None]
        if not having:
            return {}
        counts = torch.stack([self.state[item]["step"] for item in having]).tolist()  # one copy from the device
        groups: dict[int, list[Tensor]] = {}
        for item, count in zip(having, counts, strict=True):
            groups.setdefault(int(count), []).append(item)
        return groups

    @abstractmethod
    def _update(self, group: dict[str, Any], step: int, parameters: list[Tensor]) -> None:
        """The ``step``-th update of some parameters of a group, their step counts apart."""
