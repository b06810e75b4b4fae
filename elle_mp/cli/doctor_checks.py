"""What ``doctor`` looks at. No check raises: a broken package is a finding, not a crash."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from elle_mp.ops.apex import HOW, UNRELATED, what_is_wrong
from elle_mp.ops.cuda_build import find_nvcc

if TYPE_CHECKING:
    import torch

OLDEST_PYTHON, NEWEST_PYTHON = (3, 10), (3, 13)
OLDEST_TORCH = (2, 11)
LITTLE_DISK_GB = 5.0
REBUILD = "pip install --no-build-isolation --no-deps -e ."
GEMM_SIZE = 1024
GEMM_SECONDS = 0.15

REQUIRED = ("numpy", "sentencepiece", "tokenizers", "safetensors", "pydantic", "yaml", "rich", "tensorboard")
OPTIONAL = {
    "transformers": "Hugging Face comparison and conversion",
    "deepspeed": "ZeRO with offload",
    "datasets": "corpora in Hugging Face's format",
    "plotly": "the report page",
    "wandb": "logging to Weights & Biases",
}
DISTRIBUTIONS = {"yaml": "pyyaml"}

State = Literal["ok", "missing", "broken", "optional"]


@dataclass(frozen=True)
class Row:
    """One finding."""

    what: str
    """The thing looked at."""
    state: State
    """``ok``; ``missing`` or ``broken``: required, and not usable; ``optional``: nothing fails without it."""
    found: str
    """What was found: a version, a number, the reason why not."""
    hint: str = ""
    """How to get it, or what to do."""


def run_checks(run_dir: Path) -> list[Row]:
    """All findings, in the order of the table. ``run_dir``, where runs will be written, need not exist."""
    return [
        check_python(),
        *check_torch(),
        check_helpers(),
        check_ops(),
        check_cuda_ops(),
        *(check_required(name) for name in REQUIRED),
        check_nvcc(),
        *(check_optional(name, use) for name, use in OPTIONAL.items()),
        check_apex(),
        check_run_dir(run_dir),
    ]


def reason(error: BaseException) -> str:
    """The first line of an error, for a table."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def check_python() -> Row:
    """The interpreter, and whether its version is one that the package is tested on."""
    version, hint = sys.version_info[:2], ""
    supported = OLDEST_PYTHON <= version <= NEWEST_PYTHON
    if not supported:
        hint = "use Python 3.10 to 3.13: make PYTHON=python3.11"
    found = f"{platform.python_version()} ({platform.machine()}, {sys.prefix})"
    return Row("python", "ok" if supported else "broken", found, hint)


def check_torch() -> list[Row]:
    """Version, CPU capability, measured matrix speed, GPUs and the communication backends."""
    how = "pip install -c constraints.txt torch==2.13.0"
    if importlib.util.find_spec("torch") is None:
        return [Row("torch", "missing", "not installed", how)]
    try:
        import torch
    except (ImportError, OSError, RuntimeError) as error:
        return [Row("torch", "broken", reason(error), how)]
    numbers = re.match(r"(\d+)\.(\d+)", torch.__version__)
    version = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    capability = torch.backends.cpu.get_cpu_capability()
    found = f"{torch.__version__}, CPU {capability}, {torch.get_num_threads()} threads"
    if version < OLDEST_TORCH:
        return [Row("torch", "broken", found, f"2.11 or newer is needed: {how}")]
    return [Row("torch", "ok", found), check_matrix_speed(), check_gpu(), *check_backends()]


def check_matrix_speed() -> Row:
    """fp32 and bf16 GEMM rates of the device that a run would use, measured for a fraction of a second."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        fp32 = gemm_gflops(torch.float32, device)
        bf16 = gemm_gflops(torch.bfloat16, device)
    except RuntimeError as error:
        return Row("matrix speed", "broken", reason(error), "PyTorch cannot multiply here: reinstall it")
    found = f"{device.type}: fp32 {fp32:.0f} GFLOP/s, bf16 {bf16:.0f} GFLOP/s ({bf16 / fp32:.1f}x)"
    hint = "bf16 is slower than fp32 here: precision=fp32" if bf16 < fp32 else ""
    return Row("matrix speed", "ok", found, hint)


def gemm_gflops(dtype: torch.dtype, device: torch.device) -> float:
    """The best rate, in 10^9 operations per second, of a square product of side 1024."""
    import torch

    a = torch.ones(GEMM_SIZE, GEMM_SIZE, dtype=dtype, device=device)
    wait: Callable[[], Any] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    torch.mm(a, a)
    wait()
    best, spent = float("inf"), 0.0
    while spent < GEMM_SECONDS:
        start = time.perf_counter()
        torch.mm(a, a)
        wait()
        seconds = time.perf_counter() - start
        best, spent = min(best, seconds), spent + seconds
    return 2.0 * GEMM_SIZE**3 / best / 1e9


def check_gpu() -> Row:
    """The GPUs that torch sees; and the usual reason why it sees none although the machine has one."""
    import torch

    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return Row("GPU", "ok", ", ".join(f"{c.name} {c.total_memory / 2**30:.0f} GiB" for c in cards))
    if shutil.which("nvidia-smi") and torch.version.cuda is None:
        return Row("GPU", "optional", "a driver, but a CPU build of torch", "install a CUDA build of torch")
    return Row("GPU", "optional", "none; runs use the CPU")


def check_backends() -> list[Row]:
    """The backends of torch.distributed: gloo for every run, NCCL for several GPUs."""
    import torch.distributed as dist

    nccl = Row("nccl", "optional", "not in this torch", "for several GPUs: a CUDA build of torch")
    if dist.is_available() and dist.is_nccl_available():
        nccl = Row("nccl", "ok", "available")
    return [check_gloo(), nccl]


def check_gloo() -> Row:
    """Starts a gloo group of one process, which fails where the host name does not resolve."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_gloo_available()):
        return Row("gloo", "missing", "not in this torch", "install a torch built with torch.distributed")
    if dist.is_initialized():
        return Row("gloo", "ok", "in use")
    try:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=20))
        dist.destroy_process_group()
    except (RuntimeError, ValueError) as error:
        hint = "the host name must resolve: set GLOO_SOCKET_IFNAME=lo on a single machine"
        return Row("gloo", "broken", reason(error), hint)
    return Row("gloo", "ok", "a group of one process starts")


def check_helpers() -> Row:
    """The C++ dataset helpers. Without them NumPy does the same, slower."""
    try:
        importlib.import_module("elle_mp._helpers")
    except ImportError as error:
        compiler = shutil.which(os.environ.get("CXX", "g++"))
        get = "" if compiler else "install g++ and python3-dev (Fedora: gcc-c++, python3-devel), then "
        built = importlib.util.find_spec("elle_mp._helpers") is not None
        found = f"built, but does not load: {reason(error)}" if built else "not built: NumPy does it, slower"
        return Row("C++ helpers", "optional", found, get + REBUILD)
    return Row("C++ helpers", "ok", "built")


def check_ops() -> Row:
    """The compiled torch ops, and the instructions that they use here. Without them PyTorch does the same, slower."""
    if importlib.util.find_spec("torch") is None:
        return Row("compiled ops", "optional", "no torch to run them")
    from elle_mp.ops.library import instructions, what_is_wrong

    wrong = what_is_wrong()
    if wrong is not None:
        compiler = "" if shutil.which(os.environ.get("CXX", "g++")) else "install g++ (Fedora: gcc-c++), then "
        return Row("compiled ops", "optional", f"{wrong}: PyTorch does it, slower", compiler + REBUILD)
    try:
        return Row("compiled ops", "ok", f"built, using {instructions()}")
    except RuntimeError as error:
        return Row("compiled ops", "broken", reason(error), "unset ELLE_MP_INSTRUCTIONS")


def check_cuda_ops() -> Row:
    """The library of CUDA kernels: for which GPUs it was built, and whether it is loaded."""
    if importlib.util.find_spec("torch") is None:
        return Row("CUDA ops", "optional", "no torch to run them")
    from elle_mp.ops.cuda_build import built_targets
    from elle_mp.ops.library import CUDA_LIBRARY, what_is_wrong_with_cuda

    wrong = what_is_wrong_with_cuda()
    targets = f" (for {', '.join(built_targets(CUDA_LIBRARY))})" if CUDA_LIBRARY.exists() else ""
    if wrong is None:
        return Row("CUDA ops", "ok", f"built and loaded{targets}")
    hint = "" if CUDA_LIBRARY.exists() else f"for GPUs, with nvcc: ELLE_MP_BUILD_CUDA=1 {REBUILD}"
    return Row("CUDA ops", "optional", f"{wrong}{targets}", hint)


def check_required(name: str) -> Row:
    """A package that the program cannot do without: it must import."""
    how = f"pip install -c constraints.txt {DISTRIBUTIONS.get(name, name)}"
    if importlib.util.find_spec(name) is None:
        return Row(name, "missing", "not installed", how)
    try:
        importlib.import_module(name)
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        return Row(name, "broken", reason(error), how)
    return Row(name, "ok", version_of(name))


def check_optional(name: str, use: str) -> Row:
    """A package of an extra; looked up, not imported: some take seconds."""
    if importlib.util.find_spec(name) is None:
        return Row(name, "optional", f"not installed ({use})", f"pip install -e '.[{name}]'")
    return Row(name, "ok", version_of(name))


def version_of(name: str) -> str:
    """The installed version of the distribution that holds module ``name``."""
    try:
        return importlib.metadata.version(DISTRIBUTIONS.get(name, name))
    except importlib.metadata.PackageNotFoundError:
        return "installed, version unknown"


def check_nvcc() -> Row:
    """The CUDA compiler, from PATH or CUDA_HOME."""
    nvcc = find_nvcc()
    if nvcc is None:
        return Row("nvcc", "optional", "not found", "for GPU kernels: the CUDA toolkit, CUDA_HOME")
    try:
        done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return Row("nvcc", "optional", reason(error), f"{nvcc} does not run: reinstall the CUDA toolkit")
    release = re.search(r"release ([\d.]+)", done.stdout)
    return Row("nvcc", "ok", f"CUDA {release[1] if release else 'of unknown release'} ({nvcc})")


def check_apex() -> Row:
    """NVIDIA's apex, told apart from the package of that name on the registry, which is a web toolkit."""
    wrong = what_is_wrong()
    if wrong is None:
        return Row("apex", "ok", "NVIDIA's, with CUDA kernels", "parallel.apex=true takes them")
    first = "pip uninstall apex; " if wrong == UNRELATED else ""
    return Row("apex", "optional", wrong, f"{first}for its kernels on GPUs: {HOW}")


def check_run_dir(run_dir: Path) -> Row:
    """Whether runs can be written, by writing, and the space left there."""
    folder = run_dir.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".elle-mp-doctor-"):
            free = shutil.disk_usage(folder).free / 1e9
    except OSError as error:
        hint = "choose a folder that you may write to: run.dir=FOLDER"
        return Row("run folder", "broken", f"{run_dir}: cannot write in {folder}: {error.strerror}", hint)
    hint = "a checkpoint takes 12 bytes per parameter: free some space" if free < LITTLE_DISK_GB else ""
    return Row("run folder", "ok", f"{run_dir}: writable, {free:.0f} GB free", hint)
