"""Reads a configuration file with dotted overrides into :class:`elle_mp.config.Config`, or says in one line why not."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from elle_mp.config import Config, GrowConfig, ModelConfig, grown
from elle_mp.errors import UserError, existing_file

Location = tuple[Any, ...]


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in ``path`` with ``key=value`` overrides applied, checked whole.

    Raises:
        UserError: the file or an override is wrong; the message says the file, the line or the key.
    """
    try:
        text = existing_file(path, "configuration").read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); a configuration is a YAML file") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{place}: not YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: the configuration is empty; see configs/ for examples")
    lines: dict[Location, int] = {}
    if node is not None:
        _lines(node, (), lines, path)
    overridden: dict[Location, str] = {}
    for item in overrides:
        _override(tree, item, overridden)

    def where(location: Location) -> str:
        for end in range(len(location), 0, -1):
            if location[:end] in overridden:
                return f"override {overridden[location[:end]]}"
            if location[:end] in lines:
                return f"{path}:{lines[location[:end]]}"
        return str(path)

    return _validated(tree, where)


def parse_config(tree: dict[str, Any], source: str = "configuration") -> Config:
    """The configuration given as a plain tree (a saved ``config.yaml``, a test), checked whole."""
    return _validated(tree, lambda location: source)


def overridden_config(config: Config, overrides: Sequence[str]) -> Config:
    """A configuration with ``key=value`` overrides applied, checked whole.

    Raises:
        UserError: an override is wrong.
    """
    tree = config.model_dump(mode="json", by_alias=True)
    overridden: dict[Location, str] = {}
    for item in overrides:
        _override(tree, item, overridden)

    def where(location: Location) -> str:
        ends = range(len(location), 0, -1)
        return next((f"override {overridden[location[:end]]}" for end in ends if location[:end] in overridden), "run")

    return _validated(tree, where)


def _validated(tree: dict[str, Any], where: typing.Callable[[Location], str]) -> Config:
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(_first_error(error, (), where)) from None
    _check_stages(config, where)
    return config


def _lines(node: yaml.Node, location: Location, lines: dict[Location, int], path: Path) -> None:
    """Line of every key, and an error for a key given twice (YAML would keep the last one silently)."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                raise UserError(f"{path}:{key.start_mark.line + 1}: key {key.value!r} is given twice")
            seen.add(key.value)
            lines[(*location, key.value)] = key.start_mark.line + 1
            _lines(value, (*location, key.value), lines, path)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*location, index)] = value.start_mark.line + 1
            _lines(value, (*location, index), lines, path)


def _override(tree: dict[str, Any], item: str, overridden: dict[Location, str]) -> None:
    key, equals, raw = item.partition("=")
    if not equals or not key:
        raise UserError(f"override {item!r}: give it as key=value, for example optim.lr=5e-4")
    try:
        value = yaml.safe_load(raw) if raw else ""
    except yaml.YAMLError:
        raise UserError(f"override {item!r}: the value is not YAML") from None
    location: list[Any] = []
    target: Any = tree
    parts = key.split(".")
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(target, list):
            if not part.isdigit() or int(part) >= len(target):
                raise UserError(f"override {item}: {'.'.join(parts[:depth])} has entries 0 to {len(target) - 1}")
            index: Any = int(part)
        elif isinstance(target, dict):
            index = part
            if not last and not isinstance(target.get(part), dict | list):
                target[part] = {}
        else:
            raise UserError(f"override {item}: {'.'.join(parts[:depth])} has no parts")
        location.append(index)
        if last:
            target[index] = value
        else:
            target = target[index]
    overridden[tuple(location)] = item


def _first_error(error: ValidationError, prefix: Location, where: typing.Callable[[Location], str]) -> str:
    first = error.errors(include_url=False)[0]
    location = prefix + tuple(part for part in first["loc"] if not _is_union_tag(part))
    dotted = ".".join(str(part) for part in location)
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(location[-1]), known := _known_keys(location[:-1]), 1, 0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"{where(location)}: {dotted}: unknown key; {hint}"
    if first["type"] == "missing":
        return f"{where(location[:-1])}: {dotted} is missing"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] != "value_error":
        message = f"{message[0].lower()}{message[1:]}, not {first['input']!r}"
    return f"{where(location)}: {dotted}: {message}"


def _is_union_tag(part: Any) -> bool:
    return isinstance(part, str) and (part.startswith(("constrained-", "literal[")) or part in ("int", "float"))


def _known_keys(location: Location) -> list[str]:
    """The keys that the section at ``location`` knows."""
    section: Any = Config
    for part in location:
        if isinstance(part, int):
            continue
        if part in ("parallel", "batch", "optim") and section is not Config:
            section = Config.model_fields[part].annotation
            continue
        section = _section_of(section.model_fields[part].annotation)
    return [field.alias or name for name, field in section.model_fields.items()]


def _section_of(annotation: Any) -> type[BaseModel]:
    """The section class inside an annotation such as ``tuple[StageConfig, ...]`` or ``GrowConfig | None``."""
    plain = isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias)
    if plain and issubclass(annotation, BaseModel):
        return typing.cast(type[BaseModel], annotation)
    for inner in typing.get_args(annotation):
        if inner is not Ellipsis and inner is not type(None):
            return _section_of(inner)
    raise TypeError(f"no section in {annotation}")


def _check_stages(config: Config, where: typing.Callable[[Location], str]) -> None:
    """What no single field can know: stages that shrink, domains named twice, overrides of a stage."""
    if config.text_length < 2:
        raise UserError(
            f"{where(('prompts', 'tokens'))}: prompts.tokens={config.prompts.tokens} leaves {config.text_length} text "
            f"positions of model.seq_len={config.model.seq_len}; at most {config.model.seq_len - 2} would do"
        )
    _check_vocabulary(config, where)
    seen: dict[str, int] = {}
    model = config.model
    for index, stage in enumerate(config.stream):
        place: Location = ("stream", index)
        if stage.domain in seen:
            raise UserError(
                f"{where((*place, 'domain'))}: domain {stage.domain!r} is named twice (stages {seen[stage.domain]} and "
                f"{index}); give each stage its own name"
            )
        seen[stage.domain] = index
        for part in ("parallel", "batch", "optim"):
            try:
                getattr(config, f"stage_{part}")(index)
            except ValidationError as error:
                raise UserError(_first_error(error, (*place, part), where)) from None
        if stage.grow is not None:
            model = checked_growth(model, stage.grow, where, (*place, "grow"))
    if config.stream[0].recover.steps:
        raise UserError(
            f"{where(('stream', 0, 'recover'))}: stream.0.recover: the first domain has no memory to recover on"
        )


def _check_vocabulary(config: Config, where: typing.Callable[[Location], str]) -> None:
    """The tokenizer to be trained has a row for each of its pieces (one that is given is asked when it is read)."""
    if config.tokenizer.path is not None:
        return
    pieces = config.tokenizer.vocab_size
    places: list[tuple[Location, int | None]] = [(("model", "vocab"), config.model.vocab)]
    places += [(("stream", at, "grow", "vocab"), item.grow.vocab) for at, item in enumerate(config.stream) if item.grow]
    for place, rows in places:
        if rows is not None and rows < pieces:
            dotted = ".".join(str(part) for part in place)
            raise UserError(
                f"{where(place)}: {dotted}={rows} is smaller than tokenizer.vocab_size={pieces}; "
                f"{pieces} or more would do"
            )


def checked_growth(
    model: ModelConfig, grow: GrowConfig, where: typing.Callable[[Location], str], place: Location
) -> ModelConfig:
    """The sizes after a growth.

    Args:
        where: names the file and line of a key, for the message.
        place: of ``grow`` in the configuration.

    Raises:
        UserError: sizes that do not fit each other, or that shrink.
    """
    dotted = ".".join(str(part) for part in place)
    try:
        new = grown(model, grow)
    except ValidationError as error:
        raise UserError(f"{where(place)}: {dotted}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    for name, before, after in (
        ("layers", model.layers, new.layers),
        ("heads", model.heads, new.heads),
        ("kv_groups", model.groups, new.groups),
        ("head_dim", model.head_dim, new.head_dim),
        ("width", model.embed, new.embed),
        ("mlp", model.mlp_size, new.mlp_size),
        ("seq_len", model.seq_len, new.seq_len),
        ("vocab", model.vocab or 0, new.vocab or 0),
    ):
        if after < before:
            raise UserError(
                f"{where((*place, name))}: {dotted}.{name}={after} is smaller than {before} before; "
                f"a model only grows: {before} or more"
            )
    if new.heads // new.groups < model.heads // model.groups:
        raise UserError(
            f"{where(place)}: {dotted}: {new.heads} heads over {new.groups} kv_groups are {new.heads // new.groups} a "
            f"group, fewer than {model.heads // model.groups} before; "
            f"heads={model.heads // model.groups * new.groups} would do"
        )
    return new
