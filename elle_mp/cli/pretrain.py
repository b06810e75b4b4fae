"""``elle-mp pretrain``: run a stream of domains, or go on with one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def pretrain(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The configuration, a YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace the file's: optim.lr=1e-4"),
    ] = None,
) -> None:
    """Run the stream; resume where its run directory stands. Under torchrun or srun, on all ranks."""
    from elle_mp.stream.run import pretrain as run

    run(config, overrides or [])
