"""Results as one page of HTML that needs nothing else: tables, and the roofline as SVG."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from elle_mp.profiling.roofline import roofline
from elle_mp.profiling.tables import NUMBERS, difference_lines, kernel_cells, machine_lines

STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 76em; padding: 0 1em; color: #1b1f24 }
table { border-collapse: collapse; margin: 1em 0 } th, td { padding: .2em .7em; text-align: left }
th { border-bottom: 2px solid #888 } td { border-bottom: 1px solid #ddd } .n { text-align: right }
tr.ours td { background: #eef4fb } svg { max-width: 100%; height: auto }
"""


def kernels_page(results: Mapping[str, Any]) -> str:
    """The page of ``profile kernels``."""
    rows = [
        (row["side"] == "ours", (*(row[key] for key in ("op", "shape", "dtype", "pass", "side")), *kernel_cells(row)))
        for row in results["rows"]
    ]
    body = [
        roofline(results),
        f"<p>Ratio: the peer's time in ours. Peak MB: {escape(results['memory'])}; beyond the inputs.</p>",
        _table(("op", "shape", "dtype", "pass", "side"), NUMBERS, rows),
        *(f"<p>{escape(line)}</p>" for line in difference_lines(results)),
    ]
    return _page("Ops against their peers", results, body)


def step_page(results: Mapping[str, Any]) -> str:
    """The page of ``profile step``."""
    rows = [
        (False, (row["part"], row["pass"], f"{row['seconds'] * 1e3:.2f}", f"{row['share']:.1%}"))
        for row in results["rows"]
    ]
    summary = "".join(f"<p>{escape(line)}</p>" for line in results["summary"])
    return _page("One training step", results, [summary, _table(("part", "pass"), ("ms", "share"), rows)])


def _page(title: str, results: Mapping[str, Any], body: Iterable[str]) -> str:
    lines = "<br>\n".join(escape(line) for line in machine_lines(results["machine"], results["ceilings"]))
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    content = "\n".join(body)
    inner = f"<h1>{escape(title)}</h1>\n<p>{lines}</p>\n{content}"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{inner}\n</body></html>\n'


def _table(names: Sequence[str], numbers: Sequence[str], rows: Iterable[tuple[bool, Sequence[str]]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    head += "".join(f'<th class="n">{escape(name)}</th>' for name in numbers)
    lines = []
    for marked, cells in rows:
        shown = "".join(
            f"<td{'' if index < len(names) else ' class=n'}>{escape(cell)}</td>" for index, cell in enumerate(cells)
        )
        lines.append(f"<tr{' class=ours' if marked else ''}>{shown}</tr>")
    return f"<table><tr>{head}</tr>\n" + "\n".join(lines) + "\n</table>"
