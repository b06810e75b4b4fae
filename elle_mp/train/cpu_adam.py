"""DeepSpeed's Adam for the host (the kernel of its ``DeepSpeedCPUAdam``), where it can be built."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from elle_mp.config import Config
from elle_mp.parallel.deepspeed import load_deepspeed
from elle_mp.train.kernel_adam import KernelAdamW

PLACE = -1
"""The kernel keeps its settings under a number. DeepSpeed counts its own optimizers from 0."""
DECOUPLED, CORRECTED = True, True
"""Decay apart from the gradient (Loshchilov & Hutter, arXiv 1711.05101), and moments corrected for their start at 0."""
LONGEST_REASON = 160
"""Characters of what a compiler says."""
LONGEST_BUILD = 900.0
"""Seconds: two files, a minute each on a core that has nothing else to do."""
POLL = 0.5


class CpuAdamW(KernelAdamW):
    """DeepSpeed's kernel over fp32 parameters in the host's memory (ZeRO-Offload: Ren et al., arXiv 2101.06840).

    Args:
        kernel: what :func:`agreed_kernel` returns.

    Raises:
        ValueError: a parameter is not fp32, or not contiguous: the kernel would update a copy.
    """

    def __init__(self, kernel: Any, groups: list[dict[str, Any]], betas: tuple[float, float]) -> None:
        super().__init__(groups, betas)
        self.kernel = kernel
        for group in self.param_groups:
            for item in group["params"]:
                if item.dtype != torch.float32 or item.device.type != "cpu" or not item.is_contiguous():
                    raise ValueError(f"a {item.dtype} parameter on {item.device} with strides {item.stride()}")

    def _update(self, group: dict[str, Any], step: int, parameters: list[Tensor]) -> None:
        first, second = group["betas"]
        settings = group["lr"], first, second, group["eps"], group["weight_decay"]
        # Anew each time: from one step to the next the kernel multiplies powers of the betas up in fp32, so that a run
        # that was resumed would round in another way.
        self.kernel.create_adam(PLACE, *settings, DECOUPLED, False)
        for item in parameters:
            state = self.state[item]
            tensors = item, item.grad, state["exp_avg"], state["exp_avg_sq"]
            self.kernel.adam_update(PLACE, step, *settings, CORRECTED, *tensors)


def agreed_kernel() -> tuple[Any | None, str]:
    """The kernel if all ranks have it, else ``None`` and why not: replicas must round alike. Collective over the job.

    The first call in a process builds it, unless that was done on this machine before; a build that failed is not
    tried again.

    Raises:
        UserError: DeepSpeed is missing.
    """
    kernel, reason = load_kernel()
    reasons = [reason] * dist.get_world_size()
    if len(reasons) > 1:
        dist.all_gather_object(reasons, reason)
    found = next((f"rank {rank}: {text}" for rank, text in enumerate(reasons) if text), "")
    return (None if found else kernel), found


@cache
def load_kernel() -> tuple[Any | None, str]:
    """The kernel, or ``None`` and why it cannot be built here, in one line."""
    load_deepspeed()
    builder = importlib.import_module("deepspeed.ops.op_builder").CPUAdamBuilder()
    try:
        wait_for_others(LONGEST_BUILD)
        return builder.load(verbose=False), ""
    except Exception as error:  # compilers, toolkits, folders: whatever is wrong, training goes on without it
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        told = next((line for line in lines if "error:" in line or "not found" in line), lines[0])
        return None, told[:LONGEST_REASON]


def wait_for_others(seconds: float) -> None:
    """Until nobody builds the kernel. torch would wait for ever for a build that was killed, whose lock stays.

    Raises:
        TimeoutError: the lock is older than ``seconds``.
    """
    extensions = importlib.import_module("torch.utils.cpp_extension")
    lock = Path(extensions._get_build_directory("cpu_adam", verbose=False)) / "lock"
    with suppress(FileNotFoundError):
        while True:
            age = time.time() - lock.stat().st_mtime
            if age > seconds:
                raise TimeoutError(f"a build that was killed has left {lock}; delete it")
            time.sleep(min(POLL, seconds))


def check_cpu_adam(config: Config, say: Callable[[str], None]) -> None:
    """Builds the kernel before anything starts where ``parallel.cpu_adam`` wants it, and says what came of it.
    Collective over the job."""
    layouts = [config.stage_parallel(index) for index in range(len(config.stream))]
    if not any(layout.cpu_adam == "deepspeed" for layout in layouts):
        return
    say("loading DeepSpeed's CPU Adam; the first time it is built, which takes minutes")
    kernel, reason = agreed_kernel()
    if kernel is None:
        say(f"parallel.cpu_adam: it cannot be used ({reason}); torch's fused AdamW takes its place")
