"""Finds a strategy by its name: every subclass is one, so that adding one touches its own file alone."""

from __future__ import annotations

import difflib
from typing import TypeVar

from elle_mp.errors import UserError

T = TypeVar("T")


def names(kind: type[T]) -> list[str]:
    """The names of all strategies of a kind, in the order of their definition."""
    return [str(vars(item)["name"]) for item in kind.__subclasses__()]


def strategy(kind: type[T], name: str, key: str) -> T:
    """The strategy called ``name``.

    Args:
        key: of the configuration, for the message.

    Raises:
        UserError: there is none.
    """
    for item in kind.__subclasses__():
        if vars(item)["name"] == name:
            return item()
    near = difflib.get_close_matches(name, names(kind), 1)
    hint = f"did you mean {near[0]}?" if near else f"one of auto, {', '.join(names(kind))} would do"
    raise UserError(f"{key}={name}: there is no such strategy; {hint}")
