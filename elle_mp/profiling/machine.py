"""The machine that numbers were measured on, and its own ceilings, measured."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

import elle_mp
from elle_mp.ops.library import instructions
from elle_mp.train.speed import gemm_rate

COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
"""Far above any cache."""
COPIES = 7
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


@dataclass(frozen=True)
class Ceilings:
    """What the machine can do.

    Attributes:
        bandwidth: bytes per second that a large ``copy_`` reads and writes.
        gemm: FLOP/s of a square product, by type.
    """

    bandwidth: float
    gemm: Mapping[str, float]

    def least_seconds(self, moved: float, operations: float, dtype: str) -> float:
        """The roofline (Williams et al., CACM 2009): the time that memory, or else arithmetic, needs at least."""
        return max(moved / self.bandwidth, operations / self.gemm[dtype])


def measure_ceilings(device: torch.device, dtypes: tuple[str, ...]) -> Ceilings:
    """Measures both kinds of ceilings, with the threads that torch has now."""
    source = torch.ones(COPY_BYTES[device.type] // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(COPIES + 1):
        synchronise(device)
        began = time.perf_counter()
        target.copy_(source)
        synchronise(device)
        seconds.append(time.perf_counter() - began)
    bandwidth = 2 * source.numel() * 4 / statistics.median(seconds[1:])
    return Ceilings(bandwidth, {dtype: gemm_rate(device, getattr(torch, dtype)) for dtype in dtypes})


def synchronise(device: torch.device) -> None:
    """Waits for a GPU; a CPU has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on: processor, memory, GPU, versions, commit, threads, date, and who else works."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "instructions": instructions() or "not built: the references",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "numpy": numpy.__version__,
        "elle_mp": elle_mp.__version__,
        "commit": _commit(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in info.read_text().split("\n\n")[0].splitlines() if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    flags = [flag for flag in FLAGS if flag in named.get("flags", "").split()]
    return f"{named.get('model name', platform.machine())} ({', '.join(flags)})"


def _commit() -> str | None:
    """The commit that the code is of, where it lies in a git checkout."""
    folder = Path(elle_mp.__file__).resolve().parents[1]
    if not (folder / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
