"""Growing a live model takes the memory of the old one, the new one and one tensor: peaks of real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from elle_mp.config import OptimConfig
from elle_mp.growth.apply import grow_on_shards
from elle_mp.models.build import Precision, empty_model
from elle_mp.parallel.sharding import initialise
from elle_mp.train.optimizer import ShardedAdamW
from tests.tiny import config_of, grid, plan_of, spec_of

ROOT = Path(__file__).parents[2]
SIZES: dict[str, Any] = {"layers": 6, "heads": 8, "head_dim": 64, "mlp": 2048, "seq_len": 128, "vocab": 8192}
GROW = {"heads": 12, "mlp": 3072}
SLACK = 24 << 20
"""Bytes for what does not depend on the model: blocks of noise, index maps, the allocator's leftovers."""


def status(key: str) -> int:
    """A line of this process's memory, in bytes."""
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(f"{key}:"))


def measure(hoard: bool) -> dict[str, int]:
    """Grows once in this process; bytes of both models with their moments, of the largest tensor, and of the peak.

    Args:
        hoard: keep a second copy of every weight, as a growth of whole state dicts does.
    """
    old = empty_model(spec_of("gpt", **SIZES), grid(), Precision(torch.float32, torch.float32))
    initialise(old, 1)
    optimizer = ShardedAdamW(old, OptimConfig())
    for state in optimizer.moments.values():
        state.first.fill_(1e-3)
        state.second.fill_(1e-6)
    before = status("VmRSS")
    plan, _ = plan_of(old.spec, config_of("gpt", **SIZES).model, GROW)
    copies = [item.detach().clone() for item in old.parameters()] if hoard else []
    new = empty_model(plan.new, old.grid, Precision(torch.float32, torch.float32))
    larger = ShardedAdamW(new, OptimConfig())
    grow_on_shards(plan, old, new, optimizer.moments, larger.moments)
    copies += [item.detach().clone() for item in new.parameters()] if hoard else []
    sizes = [[4 * item.numel() for item in model.parameters()] for model in (old, new)]
    return {
        "old": 3 * sum(sizes[0]),
        "new": 3 * sum(sizes[1]),
        "largest": max(sizes[1]),
        "before": before,
        "peak": status("VmHWM"),
    }


@pytest.fixture(scope="module")
def measured() -> dict[bool, dict[str, int]]:
    """The growth, and the one that hoards, each in a process of its own."""

    def run(hoard: bool) -> tuple[bool, dict[str, int]]:
        code = f"import json; from tests.growth.test_memory import measure; print(json.dumps(measure({hoard})))"
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
        return hoard, json.loads(done.stdout.splitlines()[-1])

    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(run, (False, True)))


def test_the_peak_is_old_and_new_and_one_tensor(measured: dict[bool, dict[str, int]]) -> None:
    got = measured[False]
    assert got["old"] > 250e6 and got["new"] > 500e6
    taken = got["peak"] - got["before"]
    assert got["new"] - SLACK < taken < got["new"] + got["largest"] + SLACK, got


def test_a_growth_that_keeps_copies_would_be_found(measured: dict[bool, dict[str, int]]) -> None:
    got = measured[True]
    assert got["peak"] - got["before"] > got["new"] + got["largest"] + SLACK, got
