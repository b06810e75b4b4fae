"""The one exception that a user can cause. The command line turns it into exit code 2 and one line."""

from __future__ import annotations

from pathlib import Path


class UserError(Exception):
    """Something the user gave is wrong.

    The message is one line: what is wrong, where (key, file, line), and what would be right.
    """


def error_line(message: str) -> str:
    """What the command line prints of an error."""
    return "elle-mp: error: " + " ".join(message.split())


def existing_file(path: Path, what: str) -> Path:
    """Returns ``path`` if it is a readable file.

    Raises:
        UserError: it is missing or is a folder; the message names ``what`` it was wanted for.
    """
    if path.is_dir():
        raise UserError(f"{what}: {path} is a folder; give a file")
    if not path.is_file():
        raise UserError(f"{what}: no such file: {path}")
    return path
