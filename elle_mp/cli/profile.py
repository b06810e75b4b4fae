"""``elle-mp profile``: where the time goes, of single ops and of whole training steps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Measure ops and training steps against the machine's own ceilings.", no_args_is_help=True)

Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all results here.")]
Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page with tables here.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Threads of the CPU; default: torch's.")]


@app.command()
def kernels(
    op: Annotated[list[str] | None, typer.Option("--op", metavar="NAME", help="An op; default: all.")] = None,
    shape: Annotated[
        list[str] | None, typer.Option("--shape", metavar="4x512x768", help="A shape; default: a sweep.")
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option("--dtype", metavar="NAME", help="float32 or bfloat16.")] = None,
    json_file: Json = None,
    html_file: Html = None,
    threads: Threads = None,
    quick: Annotated[bool, typer.Option("--quick", help="One shape of each op, few repeats.")] = False,
) -> None:
    """Every op against its peers and the measured bandwidth and GEMM rate: time, rates, memory, ratio."""
    quieten()
    from elle_mp.profiling.kernels import profile_kernels

    profile_kernels(op or [], shape or [], dtype or [], json_file, html_file, threads, quick)


@app.command()
def step(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The configuration of a run.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE ...]", help="As of pretrain.")] = None,
    stage: Annotated[int, typer.Option("--stage", help="The stage whose model and layout are taken.")] = 0,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps without the profiler, and with it.")] = 5,
    trace: Annotated[
        Path | None, typer.Option("--trace", metavar="FILE", help="A Chrome trace of rank 0, such as trace.json.gz.")
    ] = None,
    json_file: Json = None,
    html_file: Html = None,
) -> None:
    """A training step broken into its parts, its MFU, and how much of the collectives is hidden."""
    quieten()
    from elle_mp.profiling.step import profile_step

    profile_step(config, overrides or [], stage, steps, trace, json_file, html_file)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="A.json", help="Results of 'profile kernels' or 'profile step'.")],
    second: Annotated[Path, typer.Argument(metavar="B.json", help="Others of the same kind.")],
) -> None:
    """Ratios of two files of results, and what differs between their machines, versions and commits."""
    from elle_mp.profiling.compare import compare as run

    run(first, second)


def quieten() -> None:
    """Keeps torch's profiler from telling of its starts and stops; to be called before torch is imported."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
