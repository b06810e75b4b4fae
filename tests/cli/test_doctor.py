"""doctor finds what is there, what is not, and what only has the right name."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from elle_mp.cli import doctor_checks as checks
from elle_mp.cli import main as program
from elle_mp.cli.doctor_checks import Row


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in front of the import path, for packages of the test's own making."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    for name in ("apex", "amp_C", "fused_layer_norm_cuda"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return folder


def write(folder: Path, file: str, text: str = "") -> None:
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    importlib.invalidate_caches()


def exit_code(arguments: list[str]) -> int | str | None:
    with pytest.raises(SystemExit) as end:
        program.main(arguments)
    return end.value.code


def test_doctor_runs_here(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "elle_mp", "doctor", "--json", "--run-dir", str(tmp_path / "runs")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout)
    rows = {row["what"]: row for row in report["rows"]}
    assert report["ok"] is True
    for what in (
        "python",
        "torch",
        "matrix speed",
        "gloo",
        "numpy",
        "sentencepiece",
        "tokenizers",
        "run folder",
    ):
        assert rows[what]["state"] == "ok", rows[what]
    assert {"GPU", "nccl", "C++ helpers", "nvcc", "deepspeed", "transformers", "apex"} <= set(rows)
    assert all(row["hint"] or row["state"] == "ok" or row["what"] == "GPU" for row in report["rows"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("state", "code"), [("ok", 0), ("optional", 0), ("missing", 1), ("broken", 1)])
def test_the_exit_code_is_the_verdict(
    state: checks.State, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [Row("rope", "ok", "1.0"), Row("parachute", state, "[bold] not markup", "ask")]
    monkeypatch.setattr(checks, "run_checks", lambda run_dir: rows)
    monkeypatch.setenv("COLUMNS", "120")
    assert exit_code(["doctor"]) == code
    out = capsys.readouterr().out
    assert "[bold] not markup" in out
    assert ("repaired: parachute" in out) is (code == 1)
    assert exit_code(["doctor", "--json"]) == code
    assert json.loads(capsys.readouterr().out)["ok"] is (code == 0)


def test_no_apex(site: Path) -> None:
    write(site, "apex.py")  # hides an installed one; a module is no package, so it cannot be NVIDIA's
    assert "unrelated" in checks.check_apex().found


def test_the_other_apex_is_recognised_and_never_run(site: Path) -> None:
    write(site, "apex/__init__.py", "raise RuntimeError('imported')")
    write(site, "apex/lib/libapex.py")
    row = checks.check_apex()
    assert (row.state, "unrelated" in row.found) == ("optional", True)
    assert "pip uninstall apex" in row.hint


def test_nvidias_apex(site: Path) -> None:
    write(site, "apex/__init__.py", "raise RuntimeError('imported')")
    write(site, "apex/multi_tensor_apply/__init__.py")
    row = checks.check_apex()
    assert (row.state, "without its CUDA kernels" in row.found) == ("optional", True)
    write(site, "amp_C.py", "raise RuntimeError('imported')")
    write(site, "fused_layer_norm_cuda.py", "raise RuntimeError('imported')")
    row = checks.check_apex()
    assert (row.state, row.found) == ("ok", "NVIDIA's, with CUDA kernels")


def test_without_the_helpers_it_says_how_to_build_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "elle_mp._helpers", None)
    monkeypatch.setenv("PATH", "")
    row = checks.check_helpers()
    assert row.state == "optional"
    assert "NumPy" in row.found
    assert "g++" in row.hint
    assert "--no-build-isolation" in row.hint


def test_a_required_package_is_missing() -> None:
    assert checks.check_required("no_such_package").state == "missing"


def test_a_required_package_is_broken(site: Path) -> None:
    write(site, "cracked.py", "raise ImportError('libx.so: no such file\\nsecond line')")
    row = checks.check_required("cracked")
    assert (row.state, row.found) == ("broken", "libx.so: no such file")


def test_an_extra_is_looked_up_not_imported(site: Path) -> None:
    write(site, "heavy_extra.py", "raise RuntimeError('imported')")
    assert checks.check_optional("heavy_extra", "lifting").state == "ok"
    row = checks.check_optional("no_such_extra", "nothing")
    assert (row.state, "[no_such_extra]" in row.hint) == ("optional", True)


def test_a_run_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    row = checks.check_run_dir(tmp_path / "file" / "runs")
    assert row.state == "broken"
    assert "run.dir" in row.hint


def test_nvcc_is_found_by_cuda_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")
    assert checks.check_nvcc().state == "optional"
    write(tmp_path, "bin/nvcc", "#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V12.8.61'\n")
    (tmp_path / "bin" / "nvcc").chmod(0o755)
    row = checks.check_nvcc()
    assert (row.state, "CUDA 12.8" in row.found) == ("ok", True)
