"""The ``elle-mp data`` commands, as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from elle_mp.cli.data import app
from elle_mp.errors import UserError
from tests.data.text import make_texts


def run(*arguments: object, fails: str | None = None) -> str:
    """Standard output of a command that must succeed, or (``fails``) must raise this user error."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if fails is not None:
        assert isinstance(result.exception, UserError) and fails in str(result.exception)
    else:
        assert result.exit_code == 0, result.output
    return result.output


def test_from_text_to_verified_tokens(tmp_path: Path) -> None:
    text, tokenizer, prefix = tmp_path / "a.jsonl", tmp_path / "tok", tmp_path / "out" / "a"
    text.write_text("".join(json.dumps({"text": item}) + "\n" for item in make_texts(200)))
    run("train-tokenizer", "--input", text, "--vocab-size", 400, "--out", tokenizer)
    assert (tokenizer / "tokenizer.model").is_file()
    assert "200 documents" in run("build", "--input", text, "--tokenizer", tokenizer, "--out", prefix)
    assert prefix.with_suffix(".bin").is_file() and prefix.with_suffix(".idx").is_file()
    shown = run("info", prefix, "--tokenizer", tokenizer, "--samples", 2)
    assert "documents  200" in shown and "[1] 1 " in shown and "[2]" not in shown
    assert sum(int(line.split()[2]) for line in shown.splitlines() if line.startswith("  <=")) == 200
    assert "tokenizer: matches" in run("verify", prefix, "--tokenizer", tokenizer)
    assert "checksum" in run("verify", prefix)
    run("build", "--input", text, "--tokenizer", tokenizer, "--out", prefix, fails="is there already")
    run("build", "--input", text, "--tokenizer", tokenizer, "--out", prefix, "--overwrite", "--split", "valid")
    run(
        "build",
        "--input",
        text,
        "--tokenizer",
        tokenizer,
        "--out",
        prefix,
        "--split",
        "test",
        fails="--split test",
    )
    run("verify", tmp_path / "missing", fails="missing.idx is missing")
    run(
        "train-tokenizer",
        "--input",
        text,
        "--vocab-size",
        400,
        "--out",
        tokenizer,
        "--model-type",
        "x",
        fails="unigram or bpe",
    )
    run("train-tokenizer", "--input", "builtin:x", "--vocab-size", 400, "--out", tokenizer, fails="known are")


@pytest.mark.parametrize("command", ["train-tokenizer", "build", "info", "verify"])
def test_help(command: str) -> None:
    assert "--help" in run(command, "--help")


def test_an_error_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\nnot json\n')
    command = [sys.executable, "-m", "elle_mp", "data", "train-tokenizer", "--vocab-size", "400"]
    result = subprocess.run(
        [*command, "--input", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "tok")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2 and not (tmp_path / "tok").exists()
    assert result.stderr.count("\n") == 1 and f"{tmp_path}/a.jsonl:2: not JSON" in result.stderr
