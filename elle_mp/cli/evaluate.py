"""``elle-mp evaluate``: how well a checkpoint models each domain."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CKPT", help="A checkpoint folder, or a run directory for its latest.")
    ],
    data: Annotated[
        list[str], typer.Option("--data", metavar="DOMAIN=PATH ...", help="Held-out text, one per domain.")
    ],
    more: Annotated[list[str] | None, typer.Argument(metavar="DOMAIN=PATH", hidden=True)] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers here as well.")
    ] = None,
) -> None:
    """Perplexity of every domain, AP and AP+, as a table and as JSON."""
    from elle_mp.stream.evaluate_command import evaluate as run

    # "--data a=x b=y" reaches us as one option and one argument.
    run(checkpoint, [*data, *(more or [])], json_file)
