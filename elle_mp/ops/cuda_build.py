"""How the library of CUDA kernels is built: by ``setup.py``, and by the tests, which only compile.

Imports nothing but the standard library, for ``setup.py`` runs before torch is asked for.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

TARGETS = ("sm_80", "sm_90a", "sm_100")
"""What is built where ``ELLE_MP_CUDA_TARGETS`` (names with blanks between) does not say otherwise."""

OLDEST_TORCH = "0x020b000000000000"
"""Version 2.11 of torch's stable ABI, as its headers write it."""

MARK = "elle_mp CUDA targets:"
"""Stands in the library before the names of its targets, so that they can be read without a GPU."""


def find_nvcc() -> str | None:
    """The CUDA compiler, from PATH or CUDA_HOME."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home) / "bin"))


def wanted() -> bool:
    """Whether ``setup.py`` should build the library: nvcc takes minutes, so only for a GPU that is here.

    ``ELLE_MP_BUILD_CUDA`` says 1 or 0 instead.
    """
    asked = os.environ.get("ELLE_MP_BUILD_CUDA")
    return asked == "1" if asked else Path("/dev/nvidiactl").exists()


def targets(nvcc: str) -> list[str]:
    """Those of the wanted targets that this compiler knows."""
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    chosen = os.environ.get("ELLE_MP_CUDA_TARGETS", "").split() or TARGETS
    return [target for target in chosen if target.rstrip("af") in known]


def kernel_command(nvcc: str, source: Path, out: Path, code_for: Sequence[str], few: bool = False) -> list[str]:
    """The command that makes an object of kernels (``.cu``), with code for each target; a warning is an error.

    They include none of torch's headers, which would take nvcc longer than they do. ``few``: of the kernels that differ
    in nothing but a type or an option, one, to see whether all compile.
    """
    code = [f"-gencode=arch={target.replace('sm', 'compute')},code={target}" for target in code_for]
    flags = ["-std=c++17", "-O3", "-Werror=all-warnings", "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=0"]
    flags += ["-DELLE_FEW_KERNELS"] if few else []
    return [nvcc, *flags, *code, "-c", str(source), "-o", str(out)]


def binding_command(source: Path, out: Path, code_for: Sequence[str], includes: Sequence[str]) -> list[str]:
    """The command that makes an object of the ops' host side (``.cpp``), which needs no CUDA header."""
    flags = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
    defines = [f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}", f'-DELLE_TARGETS="{MARK} {" ".join(code_for)}."']
    headers = [flag for path in includes for flag in ("-isystem", path)]
    return [os.environ.get("CXX", "g++"), *flags, *defines, *headers, "-c", str(source), "-o", str(out)]


def link_command(nvcc: str, objects: Sequence[Path], out: Path, library_paths: Sequence[str]) -> list[str]:
    """The command that makes the library; CUDA's runtime goes into it, torch's libraries do not."""
    paths = [f"-L{path}" for path in library_paths]
    return [nvcc, "-shared", "-cudart=static", *map(str, objects), *paths, "-ltorch_cpu", "-ldl", "-o", str(out)]


def built_targets(library: Path) -> list[str]:
    """The targets that a library was built for."""
    found = re.search(re.escape(MARK.encode()) + rb"([^.]*)\.", library.read_bytes())
    return found[1].decode().split() if found else []
