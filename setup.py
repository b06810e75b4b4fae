"""Builds the dataset helpers; everything else about the package is in pyproject.toml.

The helpers are optional: without a compiler the package installs and uses its NumPy fallback.
"""

from __future__ import annotations

import sys
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError

# No -march: a wheel must run on other machines, so the sources choose instructions at run time.
# No contraction into fused multiply-adds: the helpers equal their NumPy fallback bit for bit.
COMPILE_ARGS = ["-O3", "-ffp-contract=off", "-Wall", "-Wextra", "-pthread"]


def extensions() -> list[Extension]:
    """The one extension, or none where pybind11 is not installed."""
    sources = sorted(glob("csrc/helpers/*.cpp"))
    if not sources:
        return []
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError:
        print("elle_mp: dataset helpers not built: pybind11 is not installed", file=sys.stderr)
        return []
    extension = Pybind11Extension(
        "elle_mp._helpers",
        sources,
        cxx_std=17,
        extra_compile_args=COMPILE_ARGS,
        extra_link_args=["-pthread"],
        include_dirs=["csrc/helpers"],
        depends=sorted(glob("csrc/helpers/*.h") + glob("csrc/helpers/*.hpp")),
    )
    extension.optional = True
    return [extension]


class OptionalBuild(build_ext):
    """Says in one line that the helpers were not built, instead of failing the installation."""

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except (CCompilerError, ExecError, PlatformError, OSError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            print(f"elle_mp: {ext.name} not built, NumPy fallback in use: {reason}", file=sys.stderr)


setup(ext_modules=extensions(), cmdclass={"build_ext": OptionalBuild})
