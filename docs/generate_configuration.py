"""Writes docs/configuration.md from the docstrings of elle_mp/config.py.

python docs/generate_configuration.py           writes the page
python docs/generate_configuration.py --check   exit code 1 when the page is not up to date
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from elle_mp import config

PAGE = Path(__file__).with_name("configuration.md")
OPENING = """\
# Configuration

<!-- Written by docs/generate_configuration.py from elle_mp/config.py. Edit the docstrings there, not this page. -->

A configuration is a YAML file. What it leaves out has the default below; an unknown key is an error. On the command
line `key=value` overrides replace the file's values. Dots go into sections, numbers into lists:

```sh
elle-mp pretrain configs/quickstart.yaml run.dir=runs/mine optim.lr=1e-3 stream.1.grow.layers=6 stream.2.steps=200
```

A value is YAML: `growth.noise_db=null`, `optim.betas=[0.9,0.95]`. The resolved configuration is saved in the run
directory as `config.yaml`.
"""
COMPARISONS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def page() -> str:
    """The whole page."""
    plain = [row for row in rows(config.Config) if row is not None]
    parts = [OPENING, "## Top level\n", table(plain)]
    for name, section in sections(config.Config, ""):
        parts += [f"## {name}\n", f"{paragraph(section.__doc__ or '')}\n", table(list(rows(section)))]
    return "\n".join(parts)


def sections(parent: type[BaseModel], prefix: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section with its key, in the order of the configuration."""
    for name, field in parent.model_fields.items():
        section = section_of(field.annotation)
        if section is not None:
            key = f"{prefix}{field.alias or name}"
            yield key, section
            yield from sections(section, f"{key}.N." if is_list(field.annotation) else f"{key}.")


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section in an annotation such as ``tuple[StageConfig, ...]``, if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (section_of(part) for part in get_args(annotation))
    return next((section for section in found if section is not None), None)


def is_list(annotation: Any) -> bool:
    """Whether a section stands in a list of them."""
    return get_origin(annotation) is tuple


def rows(section: type[BaseModel]) -> Iterator[tuple[str, str, str, str]]:
    """Field, type, default and meaning of each field that is no section with defaults of its own."""
    meanings = docstrings(section)
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if inner is not None and section is config.Config and not is_list(field.annotation):
            continue
        meaning = meanings.get(name, "")
        if inner is not None and not meaning:
            meaning = paragraph(inner.__doc__ or "")
        yield f"`{field.alias or name}`", type_text(field.annotation, field.metadata), default_text(field), meaning


def docstrings(section: type[BaseModel]) -> dict[str, str]:
    """The string below each field in the source."""
    body = ast.parse(inspect.getsource(section)).body[0]
    assert isinstance(body, ast.ClassDef)
    out: dict[str, str] = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
            out[field.target.id] = paragraph(after.value.value)
    return out


def paragraph(text: str) -> str:
    """A docstring as one line of Markdown."""
    return " ".join(text.split()).replace("``", "`")


def type_text(annotation: Any, metadata: list[Any]) -> str:
    """A type as a reader of YAML thinks of it: ``int > 0``, ``bert, gpt or llama``, ``number or null``."""
    limits = [f"{sign} {limit}" for sign, limit in limits_of(metadata)]
    return " ".join([plain_type(annotation), " and ".join(limits)]).strip()


def plain_type(annotation: Any) -> str:
    """A type without its limits."""
    origin, parts = get_origin(annotation), get_args(annotation)
    section = section_of(annotation)
    if origin is Annotated:
        return type_text(parts[0], list(parts[1:]))
    if origin in (Union, UnionType):
        return " or ".join(plain_type(part) for part in parts)
    if origin is Literal:
        return ", ".join(f"`{json.dumps(part) if not isinstance(part, str) else part}`" for part in parts)
    if origin is tuple and section is None:
        return f"list of {len(parts)} {plain_type(parts[0])}s"
    if section is not None:
        return "list of sections" if origin is tuple else "section"
    if origin is dict:
        return "section"
    return {int: "int", float: "number", bool: "bool", str: "text", NoneType: "null"}[annotation]


def limits_of(metadata: list[Any]) -> Iterator[tuple[str, Any]]:
    """The limits that pydantic holds a value to: ``(">", 0)``, ``("matching", "`[a-z]`")``."""
    for item in metadata:
        inner = item.metadata if isinstance(item, FieldInfo) else [item]
        for limit in inner:
            for name, sign in COMPARISONS.items():
                if hasattr(limit, name):
                    yield sign, getattr(limit, name)
            if getattr(limit, "pattern", None):
                yield "matching", f"`{limit.pattern}`"


def default_text(field: FieldInfo) -> str:
    """The default as YAML; ``required`` when there is none."""
    if field.default is PydanticUndefined:
        return "required"
    if isinstance(field.default, BaseModel) or field.default in ({}, ""):
        return "empty"
    if isinstance(field.default, str):
        return f"`{field.default}`"
    if isinstance(field.default, float):
        return f"`{field.default:g}`"
    return f"`{json.dumps(field.default)}`"


def table(lines: list[tuple[str, str, str, str]]) -> str:
    """The rows as a Markdown table."""
    head = ["| key | type | default | meaning |", "|---|---|---|---|"]
    return "\n".join(head + [f"| {' | '.join(re.sub(r'[|]', '/', cell) for cell in line)} |" for line in lines]) + "\n"


def main() -> int:
    """Writes or checks the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    wanted = page()
    if not parser.parse_args().check:
        PAGE.write_text(wanted, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == wanted:
        return 0
    print(f"{PAGE} is not up to date; run python docs/generate_configuration.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
