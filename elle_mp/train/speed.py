"""The machine's own ceiling, measured: what MFU is a share of."""

from __future__ import annotations

import time

import torch

SIZE = 1024
REPEATS = 5
SECONDS = 0.2
"""No further repeat after so long: a slow machine's start should not wait for its own ceiling."""


def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product in ``dtype`` on this rank's device: the best of a few."""
    size = SIZE if device.type == "cpu" else 8 * SIZE
    left = torch.ones(size, size, dtype=dtype, device=device)
    best, start = float("inf"), time.perf_counter()
    for repeat in range(REPEATS):
        if repeat >= 2 and time.perf_counter() - start > SECONDS:
            break
        began = time.perf_counter()
        left @ left
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best
