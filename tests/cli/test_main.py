"""What the program prints and returns: help without torch, one line for every mistake of the user."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from elle_mp.cli import main as program
from elle_mp.errors import UserError

HELP = """
import sys
from elle_mp.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    heavy = {"torch", "numpy", "transformers"} & set(sys.modules)
    sys.exit(f"imported {heavy}" if heavy else end.code)
"""


def run_program(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "elle_mp", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)


def exit_code(arguments: list[str]) -> int | str | None:
    with pytest.raises(SystemExit) as end:
        program.main(arguments)
    return end.value.code


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--help"], "pretrain"),
        ([], "pretrain"),
        (["--version"], "elle-mp"),
        (["pretrain", "--help"], "CONFIG"),
        (["evaluate", "-h"], "--data"),
        (["data", "--help"], "build"),
        (["data", "build", "--help"], "--input"),
        (["doctor", "--help"], "--json"),
        (["profile", "--help"], "kernels"),
        (["profile", "kernels", "--help"], "--quick"),
        (["profile", "step", "--help"], "CONFIG"),
    ],
)
def test_help_answers_without_torch(arguments: list[str], expected: str) -> None:
    command = [sys.executable, "-c", HELP, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert expected in result.stdout
    assert result.stderr == ""


def test_a_user_error_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(path: Path, overrides: list[str]) -> None:
        raise UserError("batch.micro: 3 does not divide 64;\n   4 would")

    replace_module(monkeypatch, "elle_mp.stream.run", pretrain=fail)
    assert exit_code(["pretrain", "some.yaml"]) == 2
    assert capsys.readouterr() == ("", "elle-mp: error: batch.micro: 3 does not divide 64; 4 would\n")


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID"])
def test_only_the_first_rank_speaks(
    variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv(variable, "1")
    assert exit_code(["pretrain"]) == 2
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "named", "command"),
    [
        (["pretrain"], "CONFIG", "elle-mp pretrain --help"),
        (["nonsense"], "nonsense", "elle-mp --help"),
        (["--nonsense"], "--nonsense", "elle-mp --help"),
        (["pretrain", "x.yaml", "--nonsense"], "--nonsense", "elle-mp pretrain --help"),
        (["evaluate", "ckpt"], "--data", "elle-mp evaluate --help"),
        (["data"], "ommand", "elle-mp data --help"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(
    arguments: list[str], named: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" or arguments == ["data"]  # a bare group shows its help first
    assert err.startswith("elle-mp: error: ")
    assert err.count("\n") == 1
    assert named in err
    assert command in err


def test_a_missing_configuration_is_one_line(tmp_path: Path) -> None:
    result = run_program("pretrain", "nowhere.yaml", folder=tmp_path)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("elle-mp: error: ")
    assert result.stderr.count("\n") == 1
    assert "nowhere.yaml" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, overrides: list[str]) -> None:
        raise ZeroDivisionError

    replace_module(monkeypatch, "elle_mp.stream.run", pretrain=fail)
    with pytest.raises(ZeroDivisionError):
        program.main(["pretrain", "some.yaml"])


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(path: Path, overrides: list[str]) -> None:
        raise KeyboardInterrupt

    replace_module(monkeypatch, "elle_mp.stream.run", pretrain=interrupt)
    assert exit_code(["pretrain", "some.yaml"]) == 130
    assert capsys.readouterr() == ("", "")


def test_a_reader_that_went_away_is_no_news() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "elle_mp", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate(timeout=60)
    assert err == ""
    assert process.returncode == 1


def test_pretrain_hands_over_its_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Path, list[str]]] = []
    replace_module(monkeypatch, "elle_mp.stream.run", pretrain=lambda *args: calls.append(args))
    assert exit_code(["pretrain", "a.yaml", "seed=-1", "optim.lr=1e-4"]) == 0
    assert exit_code(["pretrain", "a.yaml"]) == 0
    assert calls == [(Path("a.yaml"), ["seed=-1", "optim.lr=1e-4"]), (Path("a.yaml"), [])]


@pytest.mark.parametrize("domains", [["--data", "a=x", "b=y"], ["--data", "a=x", "--data", "b=y"]])
def test_evaluate_takes_domains_either_way(monkeypatch: pytest.MonkeyPatch, domains: list[str]) -> None:
    calls: list[tuple[Path, list[str], Path | None]] = []
    replace_module(monkeypatch, "elle_mp.stream.evaluate_command", evaluate=lambda *args: calls.append(args))
    assert exit_code(["evaluate", "ckpt", *domains]) == 0
    assert exit_code(["evaluate", "ckpt", *domains, "--json", "out.json"]) == 0
    assert calls == [
        (Path("ckpt"), ["a=x", "b=y"], None),
        (Path("ckpt"), ["a=x", "b=y"], Path("out.json")),
    ]


def replace_module(monkeypatch: pytest.MonkeyPatch, name: str, **members: object) -> None:
    module = ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)
    # A command imports the package first; it need not be there, or be importable, for these tests.
    parent = name.rpartition(".")[0]
    monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
