"""Every source of kernels compiles without a warning, for each target that the compiler here knows. Needs no GPU.

Of kernels that differ in a type or an option only, one is compiled, all with ELLE_MP_COMPILE_ALL=1 (a minute more).
"""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from elle_mp.ops import cuda_build

SOURCES = sorted(Path(__file__).resolve().parents[2].joinpath("csrc/cuda").glob("*.cu"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_sources_compile_for_every_target(tmp_path: Path) -> None:
    nvcc = cuda_build.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc here")
    targets, few = cuda_build.targets(nvcc), os.environ.get("ELLE_MP_COMPILE_ALL") != "1"
    assert SOURCES and targets

    def compile_one(source: Path) -> subprocess.CompletedProcess[str]:
        out = tmp_path / f"{source.stem}.o"
        command = cuda_build.kernel_command(nvcc, source, out, targets, few)
        return subprocess.run(command, capture_output=True, text=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for source, done in zip(SOURCES, pool.map(compile_one, SOURCES), strict=True):
            assert done.returncode == 0 and not done.stderr, f"{source.name}: {done.stdout}{done.stderr}"
