"""The CUDA kernels on the emulator of csrc/cuda/emulator.h, as ``torch.ops.elle_mp_emulated.*`` for CPU tensors."""

from __future__ import annotations

import hashlib
import os
import subprocess
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


def compile_commands(sources: list[Path], folder: Path, defines: tuple[str, ...] = ()) -> list[list[str]]:
    """The commands that make objects of the CUDA sources with a C++ compiler."""
    flags = ["-x", "c++", "-std=c++17", "-O2", "-fPIC", "-Wall", "-Wextra", "-Werror", "-U_FORTIFY_SOURCE"]
    flags.append("-fvisibility=hidden")
    flags += ["-DELLE_EMULATED", f"-DTORCH_TARGET_VERSION={cuda_build.OLDEST_TORCH}", *defines]
    headers = [flag for path in include_paths() for flag in ("-isystem", path)]
    compiler = os.environ.get("CXX", "g++")
    return [[compiler, *flags, *headers, "-c", str(s), "-o", str(folder / f"{s.name}.o")] for s in sources]


def build() -> Path:
    """Builds the emulated library, or finds one that was made of the same sources."""
    sources = sorted([*FOLDER.glob("*.cu"), *(path for path in FOLDER.glob("*.cpp") if path.stem != "library")])
    files = sorted([*FOLDER.iterdir(), Path(__file__)])
    digest = hashlib.blake2b(b"".join(path.read_bytes() for path in files) + torch.__version__.encode())
    out = CACHE / f"{digest.hexdigest()[:16]}.so"
    if out.exists():
        return out
    folder = CACHE / f"making-{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(
            lambda command: subprocess.run(command, capture_output=True, text=True), compile_commands(sources, folder)
        ):
            assert done.returncode == 0, done.stderr
    objects = [str(folder / f"{source.name}.o") for source in sources]
    made = folder / out.name
    paths = [f"-L{path}" for path in library_paths()]
    subprocess.run([os.environ.get("CXX", "g++"), "-shared", *objects, *paths, "-ltorch_cpu", "-o", made], check=True)
    made.replace(out)  # whole or not at all: another process may look for it
    return out


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
