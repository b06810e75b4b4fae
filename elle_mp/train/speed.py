"""The machine's own ceiling, measured: what MFU is a share of."""

from __future__ import annotations

import time

import torch

SIZE = 1024
REPEATS = 5


def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product in ``dtype`` on this rank's device: the best of a few."""
    size = SIZE if device.type == "cpu" else 8 * SIZE
    left = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(REPEATS):
        began = time.perf_counter()
        left @ left
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best
