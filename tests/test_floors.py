"""The floors of the house: what may import what, and what must do without torch or the compiled helpers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINT = "from importlinter.cli import lint_imports_command; lint_imports_command(['--no-logo', '--no-cache'])"


def run_python(code: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)


def test_the_floors_hold() -> None:
    pytest.importorskip("importlinter")
    result = run_python(LINT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("axes.py", "import elle_mp.cli.main", "elle_mp.axes -> elle_mp.cli.main"),
        ("data/order.py", "import elle_mp.ops.norms", "elle_mp.data.order -> elle_mp.ops.norms"),
        ("config.py", "import torch", "elle_mp.config -> torch"),
        ("stray.py", "import json", "elle_mp.stray"),
    ],
)
def test_a_breach_is_found(tmp_path: Path, file: str, line: str, complaint: str) -> None:
    pytest.importorskip("importlinter")
    shutil.copytree(ROOT / "elle_mp", tmp_path / "elle_mp", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "elle_mp" / file).open("a") as out:
        out.write(f"\n{line}\n")
    result = run_python(LINT, tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert complaint in result.stdout


def test_configuration_imports_without_torch() -> None:
    code = "import sys, elle_mp, elle_mp.config, elle_mp.config_file; sys.exit('torch' in sys.modules)"
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_every_module_imports_without_the_compiled_helpers() -> None:
    code = """
import importlib, pkgutil, sys
sys.modules["elle_mp._helpers"] = None
import elle_mp
found = pkgutil.walk_packages(elle_mp.__path__, "elle_mp.", onerror=lambda name: sys.exit(name))
compiled = ("elle_mp._helpers", "elle_mp._ops")
names = [m.name for m in found if m.name not in ("elle_mp.__main__", *compiled)]
for name in names:
    importlib.import_module(name)
assert sys.modules["elle_mp._helpers"] is None
print(len(names))
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 20
