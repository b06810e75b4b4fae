"""The program ``elle-mp``: its commands, and what it prints and returns when something goes wrong."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from elle_mp import __version__
from elle_mp.cli import checkpoint, data, profile
from elle_mp.cli.doctor import doctor
from elle_mp.cli.evaluate import evaluate
from elle_mp.cli.grow import grow
from elle_mp.cli.pretrain import pretrain
from elle_mp.errors import UserError, error_line

# typer exports BadParameter only; what it descends from moved between releases (click, then typer itself).
USAGE_ERRORS: type[Exception] = typer.BadParameter.__mro__[2]

USER_ERROR = 2
INTERRUPTED = 130
BROKEN_PIPE = 1

app = typer.Typer(
    name="elle-mp",
    help="Pre-train language models that keep learning: growth, replay and domain prompts, sharded.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def show_version(wanted: bool) -> None:
    """Prints the version and ends, when ``--version`` was given."""
    if wanted:
        typer.echo(f"elle-mp {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Pre-train language models that keep learning: growth, replay and domain prompts, sharded."""


app.command()(pretrain)
app.command()(grow)
app.command()(evaluate)
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(data.app, name="data")
app.add_typer(profile.app, name="profile")
app.command()(doctor)


def main(args: list[str] | None = None) -> None:
    """Runs the program on ``args`` (default: the process's own) and ends the process.

    Exit codes: 0 done, 1 a command's own verdict (``doctor``) or the reader of our output went away,
    2 something the user gave is wrong, 130 Ctrl-C.
    """
    arguments = sys.argv[1:] if args is None else args
    try:
        result = app(args=arguments or ["--help"], prog_name="elle-mp", standalone_mode=False)
        sys.stdout.flush()
    except UserError as error:
        complain(str(error))
        sys.exit(USER_ERROR)
    except USAGE_ERRORS as error:
        complain(usage_line(error))
        sys.exit(USER_ERROR)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        silence_output()
        sys.exit(BROKEN_PIPE)
    # Without standalone mode a typer.Exit comes back as its code; a command returns nothing.
    sys.exit(result if isinstance(result, int) else 0)


def complain(message: str) -> None:
    """Writes one line to stderr; of the processes of a distributed run only the first does."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        print(error_line(message), file=sys.stderr, flush=True)


def usage_line(error: Exception) -> str:
    """What is wrong with the command line, and where its help is."""
    message = str(getattr(error, "format_message", lambda: error)())
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "elle-mp"
    if type(error).__name__ == "NoArgsIsHelpError":  # its message is the whole help page
        message = "a command is missing"
    return f"{message.rstrip('.')}; see '{command} --help'"


def silence_output() -> None:
    """Lets the interpreter's own last flush go nowhere, so that it does not complain either."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
