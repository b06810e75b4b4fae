"""The README and the guide: what they name exists, and their commands parse."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from elle_mp.cli.main import app
from elle_mp.config_file import load_config, parse_config

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> Iterator[list[str]]:
    """The arguments of every ``elle-mp`` and ``torchrun -m elle_mp`` in the shell blocks."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["elle-mp"]:
                yield words[1:]
            elif words[:1] == ["torchrun"]:
                assert words[3:5] == ["-m", "elle_mp"], line
                yield words[5:]
            else:
                assert not words or words[0] in ("make", "python", "tensorboard", "."), f"{page}: untested: {line}"


def parse(words: list[str]) -> Any:
    """Parses a command line as the program would, without running it; a wrong name or option raises."""
    command: Any = typer.main.get_command(app)
    context: Any = None
    while hasattr(command, "commands"):
        assert words and words[0] in command.commands, f"no command {words[:1]}"
        command, words = command.commands[words[0]], words[1:]
    context = command.make_context(command.name, list(words))
    return context.params


def configuration(page: Path, name: str, folder: Path) -> Path:
    """The file of a command: one of the repository, or the whole example of the page saved under that name."""
    if (ROOT / name).is_file():
        return ROOT / name
    whole = [block for block in blocks(page, "yaml") if "model:" in block]
    assert len(whole) == 1, f"{page.name}: {name} is neither a file nor the page's example"
    (folder / name).write_text(whole[0], encoding="utf-8")
    return folder / name


@pytest.mark.parametrize("name", NAMES)
def test_every_command_parses_and_its_overrides_load(name: str, tmp_path: Path) -> None:
    page = ROOT / name
    for words in commands(page):
        params = parse(words)
        if words[0] == "pretrain":
            load_config(configuration(page, str(params["config"]), tmp_path), params["overrides"] or [])


def test_the_readme_shows_every_command() -> None:
    shown = {tuple(words[: 2 if words[0] == "data" else 1]) for page in PAGES for words in commands(page)}
    group: Any = typer.main.get_command(app)
    known = {(name,) for name in group.commands if name != "data"}
    known |= {("data", name) for name in group.commands["data"].commands}
    assert shown == known


def test_a_wrong_command_would_be_found() -> None:
    with pytest.raises(AssertionError):
        parse(["pretrian", "configs/quickstart.yaml"])
    with pytest.raises(Exception, match="--splitt"):
        parse(["data", "build", "--splitt", "all"])


@pytest.mark.parametrize("name", NAMES)
def test_every_yaml_example_loads(name: str) -> None:
    for block in blocks(ROOT / name, "yaml"):
        parse_config(yaml.safe_load(block), name)


@pytest.mark.parametrize("name", NAMES)
def test_every_file_and_sub_command_that_is_named_exists(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for path in re.findall(r"\b((?:configs|docs|benchmarks)/[\w./-]*\w)", text):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\(([^)#]*)(?:#[^)]*)?\)", text):
        assert not link or (ROOT / name).parent.joinpath(link).exists(), link
    group: Any = typer.main.get_command(app)
    for command in re.findall(r"`elle-mp ([a-z-]+)", text):
        assert command in group.commands, command


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_that_is_named_exists(name: str) -> None:
    settings: dict[str, set[str]] = {}
    for line in (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = settings.setdefault(line[3:].removeprefix("stream.N."), set())
        elif line.startswith("| `"):
            section.add(line.split("`")[1])
    del settings["stream"]
    text = (ROOT / name).read_text(encoding="utf-8")
    for part, key in re.findall(rf"`(?!tokenizer\.model`)({'|'.join(settings)})\.(\w+)(?![\w.])", text):
        assert key in settings[part], f"{part}.{key}"


def test_every_configuration_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "configs").glob("*.yaml"):
        assert f"`configs/{path.name}`" in text, path.name


def test_the_page_of_the_configuration_is_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "docs" / "generate_configuration.py"), "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
