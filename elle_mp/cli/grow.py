"""``elle-mp grow``: makes a checkpoint's model larger, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def grow(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CKPT", help="A checkpoint folder, or a run directory for its latest.")
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[OUT] [KEY=VALUE ...]",
            help="A new run directory, and sizes (layers=8 heads=8 kv_groups= head_dim= width= mlp= seq_len= vocab=) "
            "or settings (growth.width=iso). Without sizes: those of the run's next stage.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan and write nothing; OUT may be left out.")
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Check the old checkpoint's hashes; compare logits, and perplexities where the text is at hand.",
        ),
    ] = False,
    max_memory: Annotated[
        str, typer.Option("--max-memory", metavar="SIZE", help="Of each process, for example 4G or 800M.")
    ] = "2G",
) -> None:
    """A larger checkpoint that computes the same, optimizer state included, whatever layout wrote or reads it.

    OUT is a run directory: 'elle-mp evaluate OUT' reads it, 'elle-mp pretrain OUT/config.yaml' goes on with it.
    For the bytes that a live growth would send: --dry-run with parallel.tp=2 parallel.dp_shard=4.
    """
    from elle_mp.stream.grow_command import Options, grow_command

    grow_command(checkpoint, arguments or [], Options(dry_run=dry_run, verify=verify, max_memory=max_memory))
