"""``benchmarks/gpu.sh`` before there is a GPU: its syntax, what it refuses, and its Python part on tiny shapes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks/gpu.sh"


def test_the_syntax_of_the_script() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_an_unknown_argument_is_refused() -> None:
    done = subprocess.run(["bash", str(SCRIPT), "--gpu"], capture_output=True, text=True)
    assert done.returncode == 2 and "unknown argument --gpu" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run(["bash", str(SCRIPT), "--python", sys.executable], capture_output=True, text=True)
    assert done.returncode == 2 and "sees no GPU" in done.stderr


@pytest.mark.slow
def test_the_benchmark_runs_on_tiny_shapes(tmp_path: Path) -> None:
    out = tmp_path / "gpu.md"
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--device", "cpu", "--quick", "--markdown", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=None)
    assert done.returncode == 0, done.stderr
    text = out.read_text()
    for side in ("expanded_attention", "SDPA", "expand", "copy_", "weighted_layer_norm", "linear_cross_entropy"):
        assert f"| {side} |" in text
    assert "does not run" not in text
