"""Draws the tables of a run as a picture: ``python docs/draw_tables.py RUN OUT.svg``."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI

from elle_mp.stream.run import print_results

WIDTH = 90
CELL = 12.2
"""Width of a character in rich's SVG."""


def draw(run: Path) -> str:
    """The tables of ``results.json`` as SVG, without the web font that rich would load."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), highlight=False)
    print_results(console, json.loads((run / "results.json").read_text(encoding="utf-8")))
    svg = console.export_svg(title="elle-mp pretrain", theme=MONOKAI, unique_id="tables")
    svg = re.sub(r'x="([\d.]+)" (y="[\d.]+") textLength="([\d.]+)"([^>]*)>((?:&#160;)+)', shift_blanks, svg)
    svg = re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    return svg.replace("Fira Code, monospace", "DejaVu Sans Mono, Menlo, Consolas, monospace")


def shift_blanks(found: re.Match[str]) -> str:
    """A cell that begins with blanks, moved to where its text begins: some viewers drop leading blanks."""
    blanks = found[5].count(";") * CELL
    return f'x="{float(found[1]) + blanks:.1f}" {found[2]} textLength="{float(found[3]) - blanks:.1f}"{found[4]}>'


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(draw(Path(sys.argv[1])), encoding="utf-8")
