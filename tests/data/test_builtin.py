"""Built-in text: enough of it, in a fixed order, split by source file, read without importing."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Literal

import pytest

from elle_mp.data import builtin
from elle_mp.errors import UserError

NAMES = ("docs", "code", "science")
SPLITS: tuple[Literal["train", "valid", "all"], ...] = ("train", "valid", "all")


@pytest.fixture(scope="module")
def documents() -> dict[str, list[str]]:
    """Everything, read once."""
    return {name: list(builtin.read_builtin(name, "all")) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_sizes(documents: dict[str, list[str]], name: str) -> None:
    assert 1_000_000 < sum(map(len, documents[name])) < 1.2 * builtin.MAX_CHARACTERS
    assert all(documents[name])


@pytest.mark.parametrize("name", NAMES)
def test_splits_share_nothing_and_lose_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "MAX_CHARACTERS", 400_000)
    train, valid, both = (list(builtin.read_builtin(name, split)) for split in SPLITS)
    assert sorted(train + valid) == sorted(both)
    assert not set(train) & set(valid)
    assert 0.01 < sum(map(len, valid)) / sum(map(len, train)) < 0.5


def test_code_is_the_library_byte_for_byte(documents: dict[str, list[str]]) -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = {path.read_text(encoding="utf-8", errors="replace") for path in root.glob("*.py")}
    assert len(texts & set(documents["code"])) > 30


def test_the_texts_are_what_they_say(documents: dict[str, list[str]]) -> None:
    docs, science = "\n".join(documents["docs"]), "\n".join(documents["science"])
    assert "The standard type hierarchy" in docs  # a topic
    assert "class OrderedDict" in docs or "class JSONEncoder" in docs
    assert "Parameters\n----------" in science
    assert "torch.abs" in science or "torch.add" in science  # strings that add_docstr attaches


def test_nothing_is_imported_and_the_order_is_fixed() -> None:
    program = (
        "import sys, hashlib; from elle_mp.data.builtin import read_builtin;"
        "before = set(sys.modules);"
        "print(hashlib.sha256(''.join(read_builtin('science', 'valid')).encode()).hexdigest());"
        "print('torch' in sys.modules, 'numpy' in set(sys.modules) - before)"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1] and runs[0].splitlines()[1] == "False False"


def test_an_installation_without_sources_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(builtin.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UserError, match="no source files"):
        list(builtin.read_builtin("code", "train"))


def test_fingerprint_follows_the_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(builtin.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    (tmp_path / "a.py").write_text("x = 1\n")
    first = builtin.fingerprint("code")
    assert builtin.fingerprint("code") == first
    (tmp_path / "b.py").write_text("x = 1\n")
    assert builtin.fingerprint("code") != first
