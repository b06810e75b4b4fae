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
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only say what every stage would hold, send and compute on each rank, of parallel.world_size ranks.",
        ),
    ] = False,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --dry-run: also write the numbers here.")
    ] = None,
) -> None:
    """Run the stream; resume where its run directory stands. Under torchrun or srun, on all ranks."""
    if not dry_run:
        if json is not None:
            raise typer.BadParameter("it goes with --dry-run", param_hint="--json")
        from elle_mp.stream.run import pretrain as run

        run(config, overrides or [])
        return
    from elle_mp.stream.dry_run import dry_run as plan

    if found := plan(config, overrides or [], json):
        for line in found:
            typer.echo(f"elle-mp: error: {line}", err=True)
        raise typer.Exit(2)
