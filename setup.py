"""Builds the compiled parts; everything else about the package is in pyproject.toml.

Both are optional: without a compiler the package installs and uses its NumPy and PyTorch twins.
"""

from __future__ import annotations

import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError

# No -march: a wheel must run on other machines, so the sources choose instructions at run time.
COMPILE_ARGS = ["-O3", "-Wall", "-Wextra", "-pthread"]
# The helpers equal their NumPy fallback bit for bit, so they contract nothing into fused multiply-adds.
EXACT = ["-ffp-contract=off"]
OPS = "elle_mp._ops"
OLDEST_TORCH = "0x020b000000000000"
"""Version 2.11 of torch's stable ABI, as its headers write it."""


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
        extra_link_args=["-pthread"],
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
        define_macros=[("TORCH_TARGET_VERSION", OLDEST_TORCH)],
        # torch's headers are not ours to warn about.
        extra_compile_args=[
            *COMPILE_ARGS,
            "-g0",
            "-std=c++17",
            "-fvisibility=hidden",
            *(f"-isystem{p}" for p in include_paths()),
        ],
        extra_link_args=["-pthread"],
        library_dirs=library_paths(),
        libraries=["torch_cpu"],
        depends=sorted([*glob("csrc/ops/*.h"), "csrc/helpers/hashing.h"]),
    )


def extensions() -> list[Extension]:
    """What can be built here."""
    found = [extension for extension in (helpers(), ops()) if extension is not None]
    for extension in found:
        extension.optional = True
    return found


class OptionalBuild(build_ext):
    """Says in one line that something was not built, instead of failing the installation."""

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except (CCompilerError, ExecError, PlatformError, OSError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            print(f"elle_mp: {ext.name} not built, its Python twin in use: {reason}", file=sys.stderr)

    def get_ext_filename(self, fullname: str) -> str:
        """The op library has no Python version in its name: one build serves them all."""
        *folders, name = fullname.split(".")  # setuptools asks with the package and without
        if name == OPS.split(".")[-1]:
            return str(Path(*folders, name).with_suffix(".so"))
        return super().get_ext_filename(fullname)


setup(ext_modules=extensions(), cmdclass={"build_ext": OptionalBuild})
