"""``elle-mp doctor``: what is installed, built and reachable; what is missing and how to get it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from elle_mp.cli.doctor_checks import Row

COLOURS = {"ok": "green", "optional": "yellow", "missing": "bold red", "broken": "bold red"}


def doctor(
    run_dir: Annotated[Path, typer.Option("--run-dir", metavar="FOLDER", help="Where runs will be written.")] = Path(
        "runs"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """What is installed, built and reachable; how to get the rest. Exit code 1: a required thing fails."""
    from elle_mp.cli.doctor_checks import run_checks

    rows = run_checks(run_dir)
    bad = [row.what for row in rows if row.state in ("missing", "broken")]
    if as_json:
        typer.echo(json.dumps({"ok": not bad, "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        print_table(rows, bad)
    if bad:
        raise typer.Exit(1)


def print_table(rows: list[Row], bad: list[str]) -> None:
    """Writes the findings as a table, then one line that sums them up."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("what", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("found", overflow="fold")
    table.add_column("how to get it", overflow="fold")
    for row in rows:
        # Text, not str: a path or an error may hold square brackets, which rich would read as markup.
        table.add_row(row.what, Text(row.state, COLOURS[row.state]), Text(row.found), Text(row.hint))
    console = Console()
    console.print(table)
    verdict = f"Not usable until repaired: {', '.join(bad)}." if bad else "Everything required is there."
    console.print(Text("\n" + verdict, "bold red" if bad else "green"))
