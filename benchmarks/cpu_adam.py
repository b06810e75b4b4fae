"""A step of AdamW in the host's memory: torch's fused one against DeepSpeed's kernel (``parallel.cpu_adam``).

    OMP_NUM_THREADS=2 python benchmarks/cpu_adam.py [--repeats 15]

Both update the same 124 million fp32 weights, gradients and moments, in the shapes of GPT-2's smallest model or as one
flat tensor, in turn, so that a machine that is slow for a while slows both. The yardstick is a copy of the weights. A
step reads four numbers a weight and writes three. The kernel is built first if it has not been (minutes).
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from math import prod
from statistics import median

import torch
from torch import Tensor

from elle_mp.config import OptimConfig
from elle_mp.train.cpu_adam import CpuAdamW, load_kernel
from elle_mp.train.optimizer import inner_optimizer

WIDTH, LAYERS, VOCAB, POSITIONS = 768, 12, 50257, 1024
WARM_UP = 2
MOVED = 28
"""Bytes of a weight's step."""
OPTIM = OptimConfig(lr=1e-4)


def shapes() -> list[tuple[int, ...]]:
    """Of the parameters of GPT-2's smallest model."""
    d = WIDTH
    layer = [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [(VOCAB, d), (POSITIONS, d), (d,), (d,), *(layer * LAYERS)]


def seconds(work: Callable[[], object]) -> float:
    """Wall time of some work."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def steps(weights: list[Tensor], repeats: int) -> dict[str, list[float]]:
    """Seconds of each step of each optimizer, in turn, on the same state."""
    kernel, reason = load_kernel()
    if kernel is None:
        raise SystemExit(f"DeepSpeed's CPU Adam cannot be built here: {reason}")

    def groups() -> list[dict[str, object]]:
        return [{"params": weights, "lr": OPTIM.lr, "eps": OPTIM.eps, "weight_decay": OPTIM.weight_decay}]

    optimizers = {"torch": inner_optimizer(groups(), OPTIM, False)}
    optimizers["deepspeed"] = CpuAdamW(kernel, groups(), OPTIM.betas)
    for weight in weights:
        weight.grad = torch.randn_like(weight) * 1e-3
        state = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
        for optimizer in optimizers.values():
            optimizer.state[weight] = state
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(WARM_UP + repeats):
        for name, optimizer in optimizers.items():
            times[name].append(seconds(optimizer.step))
    return {name: found[WARM_UP:] for name, found in times.items()}


def copy_seconds(count: int) -> float:
    """Median time of a copy of so many fp32 numbers."""
    source, target = torch.randn(count), torch.empty(count)
    return median([seconds(lambda: target.copy_(source)) for _ in range(7)][WARM_UP:])


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    torch.manual_seed(1)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    count = sum(prod(shape) for shape in shapes())
    for sizes in (shapes(), [(count,)]):
        copy = copy_seconds(count)
        times = steps([torch.randn(size) * 0.02 for size in sizes], repeats)
        print(f"{len(sizes)} tensors, {count} weights; a copy moves {8e-9 * count / copy:.1f} GB/s")
        for which, found in times.items():
            rate = MOVED * count / median(found) * 1e-9
            low, middle, high = (f"{1e3 * value:.0f}" for value in (min(found), median(found), max(found)))
            print(f"  {which}: {middle} ms ({low} to {high}), {rate:.1f} GB/s")
        ratio = median(a / b for a, b in zip(times["torch"], times["deepspeed"], strict=True))
        print(f"  torch / deepspeed: {ratio:.2f}")


if __name__ == "__main__":
    main()
