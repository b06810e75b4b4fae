"""The CUDA kernels on the emulator of csrc/cuda/emulator.h, as ``torch.ops.elle_mp_emulated.*`` for CPU tensors."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

from elle_mp.ops import cuda_build, library

FOLDER = Path(__file__).resolve().parents[2] / "csrc/cuda"
CACHE = FOLDER.parents[1] / "build/emulated"
SHARED_OPS = (
    "expanded_attention",
    "expanded_attention_backward",
    "packed_attention",
    "packed_attention_backward",
    "logit_statistics",
    "logit_gradient",
    "add_norm",
    "add_norm_backward",
)
"""Ops that the CPU library defines; the CUDA library defines the others."""


def compile_command(source: Path, out: Path) -> list[str]:
    """The command that makes an object of a CUDA source with a C++ compiler."""
    flags = ["-x", "c++", "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
    flags += ["-U_FORTIFY_SOURCE", "-DELLE_EMULATED", f"-DTORCH_TARGET_VERSION={cuda_build.OLDEST_TORCH}"]
    headers = [flag for path in include_paths() for flag in ("-isystem", path)]
    return [os.environ.get("CXX", "g++"), *flags, *headers, "-c", str(source), "-o", str(out)]


def build() -> Path:
    """Builds the emulated library, or finds one that was made of the same sources."""
    files = sorted([*FOLDER.iterdir(), Path(__file__)])
    digest = hashlib.blake2b(b"".join(path.read_bytes() for path in files) + torch.__version__.encode())
    out = CACHE / f"{digest.hexdigest()[:16]}.so"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:  # of processes that want it at a time, one builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as folder:
                make(Path(folder), out)
    return out


def make(folder: Path, out: Path) -> None:
    """Builds the library in ``folder`` and moves it to ``out``."""
    # The host sides in one file: torch's headers take most of the time.
    bindings = folder / "bindings.cpp"
    hosts = sorted(path for path in FOLDER.glob("*.cpp") if path.stem != "library")
    bindings.write_text("".join(f'#include "{path}"\n' for path in hosts))
    sources = [bindings, *sorted(FOLDER.glob("*.cu"))]
    objects = [folder / f"{source.name}.o" for source in sources]
    commands = [compile_command(source, found) for source, found in zip(sources, objects, strict=True)]
    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(lambda command: subprocess.run(command, capture_output=True, text=True), commands):
            assert done.returncode == 0, done.stderr
    made, paths = folder / out.name, [f"-L{path}" for path in library_paths()]
    linker = [os.environ.get("CXX", "g++"), "-shared", *map(str, objects), *paths, "-ltorch_cpu", "-o", str(made)]
    subprocess.run(linker, check=True)
    made.replace(out)


@pytest.fixture(scope="session")
def emulated() -> Any:
    """``torch.ops.elle_mp_emulated``."""
    if library.what_is_wrong() is not None:
        pytest.skip("the ops are not built")
    definitions = torch.library.Library("elle_mp_emulated", "FRAGMENT")
    for name in filter(library.compiled_ops, SHARED_OPS):
        schema = str(getattr(torch.ops.elle_mp, name).default._schema)
        definitions.define(schema.replace("elle_mp::", "", 1))
    torch.ops.load_library(build())
    library.register_cuda_fakes("elle_mp_emulated")
    yield torch.ops.elle_mp_emulated
    del definitions


@pytest.fixture(params=["forward", "reverse", "1"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """In which order the threads of a block run between barriers."""
    monkeypatch.setenv("ELLE_MP_EMULATED_ORDER", request.param)
    return str(request.param)
