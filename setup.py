"""Builds the compiled parts; everything else about the package is in pyproject.toml.

All are optional: without a compiler the package installs and uses its NumPy and PyTorch twins. The CUDA library is
built where nvcc and a GPU are, or with ELLE_MP_BUILD_CUDA=1 (elle_mp/ops/cuda_build.py).
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path
from subprocess import SubprocessError

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError
from setuptools.modified import newer_group

sys.path.insert(0, str(Path(__file__).resolve().parent))
from elle_mp.ops import cuda_build

# No -march: a wheel must run on other machines, so the sources choose instructions at run time.
COMPILE_ARGS = ["-O3", "-Wall", "-Wextra", "-pthread"]
LINK_ARGS = ["-pthread"]
if os.environ.get("ELLE_MP_SANITIZE"):  # see csrc/sanitize.sh
    COMPILE_ARGS += ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover", "-fno-omit-frame-pointer"]
    LINK_ARGS += ["-fsanitize=address,undefined"]
# The helpers equal their NumPy fallback bit for bit, so they contract nothing into fused multiply-adds.
EXACT = ["-ffp-contract=off"]
OPS = "elle_mp._ops"
CUDA_OPS = "elle_mp._cuda_ops"


def helpers() -> Extension | None:
    """The Python module of dataset and other helpers, or ``None`` where pybind11 is not installed."""
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError:
        print("elle_mp: helpers not built: pybind11 is not installed", file=sys.stderr)
        return None
    return Pybind11Extension(
        "elle_mp._helpers",
        sorted(glob("csrc/helpers/*.cpp")),
        cxx_std=17,
        extra_compile_args=COMPILE_ARGS + EXACT,
        extra_link_args=LINK_ARGS,
        include_dirs=["csrc/helpers"],
        depends=sorted(glob("csrc/helpers/*.h")),
    )


def ops() -> Extension | None:
    """The library of torch ops, no Python module, or ``None`` where torch is not installed."""
    try:
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError as error:
        print(f"elle_mp: ops not built: {error}", file=sys.stderr)
        return None
    return Extension(
        OPS,
        sorted(glob("csrc/ops/*.cpp")),
        language="c++",
        define_macros=[("TORCH_TARGET_VERSION", cuda_build.OLDEST_TORCH)],
        # torch's headers are not ours to warn about.
        extra_compile_args=[
            *COMPILE_ARGS,
            "-g0",
            "-std=c++17",
            "-fvisibility=hidden",
            *(f"-isystem{p}" for p in include_paths()),
        ],
        extra_link_args=LINK_ARGS,
        library_dirs=library_paths(),
        libraries=["torch_cpu"],
        depends=sorted([*glob("csrc/ops/*.h"), "csrc/helpers/hashing.h"]),
    )


def cuda_ops() -> Extension | None:
    """The library of CUDA kernels, or ``None`` where it is not wanted or cannot be built."""
    if not cuda_build.wanted():
        return None
    if cuda_build.find_nvcc() is None:
        print("elle_mp: CUDA ops not built: no nvcc", file=sys.stderr)
        return None
    return Extension(
        CUDA_OPS,
        sorted([*glob("csrc/cuda/*.cu"), *glob("csrc/cuda/*.cpp")]),
        depends=sorted([*glob("csrc/cuda/*.cuh"), *glob("csrc/cuda/*.h")]),
    )


def extensions() -> list[Extension]:
    """What can be built here."""
    found = [extension for extension in (helpers(), ops(), cuda_ops()) if extension is not None]
    for extension in found:
        extension.optional = True
    return found


class OptionalBuild(build_ext):
    """Says in one line that something was not built, instead of failing the installation."""

    def build_extension(self, ext: Extension) -> None:
        try:
            if ext.name == CUDA_OPS:
                self.build_cuda(ext)
            else:
                super().build_extension(ext)
        except (CCompilerError, ExecError, PlatformError, OSError, SubprocessError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            print(f"elle_mp: {ext.name} not built, its Python twin in use: {reason}", file=sys.stderr)

    def build_cuda(self, ext: Extension) -> None:
        """Compiles with nvcc, which setuptools does not know."""
        from torch.utils.cpp_extension import include_paths, library_paths

        library = Path(self.get_ext_fullpath(ext.name))
        made_from = [*ext.sources, *ext.depends, cuda_build.__file__]
        if not (self.force or newer_group(made_from, str(library), "newer")):
            return
        nvcc = cuda_build.find_nvcc() or "nvcc"
        folder = Path(self.build_temp) / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        objects = [folder / f"{Path(source).name}.o" for source in ext.sources]
        targets, includes = cuda_build.targets(nvcc), include_paths()
        commands = [
            cuda_build.kernel_command(nvcc, Path(source), out, targets)
            if source.endswith(".cu")
            else cuda_build.binding_command(Path(source), out, targets, includes)
            for source, out in zip(ext.sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in pool.map(self.spawn, commands):
                pass
        self.spawn(cuda_build.link_command(nvcc, objects, library, library_paths()))

    def get_ext_filename(self, fullname: str) -> str:
        """The op libraries have no Python version in their names: one build serves them all."""
        *folders, name = fullname.split(".")  # setuptools asks with the package and without
        if name in (OPS.split(".")[-1], CUDA_OPS.split(".")[-1]):
            return str(Path(*folders, name).with_suffix(".so"))
        return super().get_ext_filename(fullname)


setup(ext_modules=extensions(), cmdclass={"build_ext": OptionalBuild})
