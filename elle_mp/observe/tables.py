"""Results as tables for a terminal of 100 columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

LOG_WIDTH = 160
"""Columns of a log or a pipe, which have no width of their own. The tables of five domains need 100."""


def make_console(first: bool = True) -> Console:
    """Where results go: standard output of rank 0, wide enough for the tables when it is no terminal."""
    console = Console(quiet=not first, highlight=False)
    return console if console.is_terminal else Console(quiet=not first, highlight=False, width=LOG_WIDTH)


def stages_table(results: Mapping[str, Any]) -> Table:
    """One row a stage: its sizes, the perplexity of each seen domain, AP and AP+ (``results.json``)."""
    stages = results["stages"]
    domains = list(dict.fromkeys(stage["domain"] for stage in stages))
    table = _table("Perplexity of every seen domain after each stage", ["stage"])
    for name in ("layers", "heads", "width", "params", "tokens", *domains, "AP", "AP+"):
        table.add_column(Text(name), justify="right", no_wrap=True, min_width=5 if name in domains else None)
    for stage in stages:
        ppl, own = stage["ppl"], stage["domain"]
        perplexities = [
            Text(_short(ppl[name]), "bold" if name == own else "") if name in ppl else "" for name in domains
        ]
        table.add_row(
            Text(own),
            str(stage["layers"]),
            str(stage["heads"]),
            str(stage["embed"]),
            _count(stage["params"]),
            _count(stage["tokens"]),
            *perplexities,
            _short(stage["ap"]),
            _change(stage["ap_plus"]),
        )
    return table


def growth_table(results: Mapping[str, Any]) -> RenderableType:
    """What each growth changed: a row of sizes and differences, then perplexities before, after, and recovered."""
    growths = [(stage["domain"], stage["growth"]) for stage in results["stages"] if stage["growth"]]
    changes = _table("Growth: is it the same function?", ["for", "layers", "heads", "width", "strategy", "exact"])
    for name in ("logit diff", "relative", "seconds", "sent"):
        changes.add_column(name, justify="right", no_wrap=True)
    effects = _table("Perplexity around growth", ["for", "domain"])
    for name in ("before", "after", "recovered"):
        effects.add_column(name, justify="right", no_wrap=True)
    for domain, growth in growths:
        changes.add_row(
            Text(domain),
            *(f"{growth['from'][key]}->{growth['to'][key]}" for key in ("layers", "heads", "embed")),
            "\n".join(dict.fromkeys((growth["width"], growth["depth"]))),
            Text("yes", "green") if growth["exact"] else Text("no", "yellow"),
            f"{growth['max_logit_diff']:.1e}",
            f"{growth['max_logit_diff_rel']:.1e}",
            f"{growth['seconds']:.2f}",
            _bytes(growth["bytes_communicated"]),
        )
        recovered = growth["ppl_recovered"] or {}
        for index, (other, before) in enumerate(growth["ppl_before"].items()):
            effects.add_row(
                Text(domain) if index == 0 else "",
                Text(other),
                f"{before:.4f}",
                f"{growth['ppl_after'][other]:.4f}",
                f"{recovered[other]:.2f}" if other in recovered else "",
            )
        effects.add_section()
    inexact = [Text(f"{domain}: not exact: {growth['reason']}") for domain, growth in growths if not growth["exact"]]
    return Group(changes, *inexact, effects)


def evaluation_table(scores: Mapping[str, Any]) -> Table:
    """Perplexities of one checkpoint, AP and AP+ (``evaluate``)."""
    table = _table("Perplexity", ["domain"])
    table.add_column("perplexity", justify="right", no_wrap=True)
    for domain, value in scores["ppl"].items():
        table.add_row(Text(domain), f"{value:.3f}")
    table.add_section()
    table.add_row("AP", f"{scores['ap']:.3f}")
    if scores["ap_plus"] is not None:
        table.add_row("AP+", f"{scores['ap_plus']:+.3f}")
    return table


def _table(title: str, columns: Iterable[str]) -> Table:
    table = Table(
        title=f"\n{title}",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    for name in columns:
        table.add_column(name, no_wrap=True)
    return table


def _short(value: float | None) -> str:
    """A perplexity in five characters; a diverged model's is not finite, and ``null`` in the file."""
    if value is None:
        return "-"
    return f"{value:.0e}" if value >= 99999.5 else f"{value:.{_decimals(value)}f}"


def _change(value: float | None) -> str:
    return "" if value is None else f"{value:+.{_decimals(value)}f}"


def _decimals(value: float) -> int:
    return 2 if abs(value) < 99.995 else 1 if abs(value) < 999.95 else 0


def _count(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return str(int(value))


def _bytes(value: int) -> str:
    for size, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return str(value)
