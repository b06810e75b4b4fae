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
    table = plain_table("Perplexity of every seen domain after each stage", ["stage"])
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
    changes = plain_table("Growth: is it the same function?", ["for", "layers", "heads", "width", "strategy", "exact"])
    for name in ("logit diff", "relative", "seconds", "sent"):
        changes.add_column(name, justify="right", no_wrap=True)
    effects = plain_table("Perplexity around growth", ["for", "domain"])
    for name in ("before", "after", "recovered"):
        effects.add_column(name, justify="right", no_wrap=True)
    for domain, growth in growths:
        changes.add_row(
            Text(domain),
            *(f"{growth['from'][key]}->{growth['to'][key]}" for key in ("layers", "heads", "embed")),
            "\n".join(dict.fromkeys((growth["width"], growth["depth"]))),
            Text("yes", "green") if growth["exact"] else Text("no", "yellow"),
            _small(growth["max_logit_diff"]),
            _small(growth["max_logit_diff_rel"]),
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


def plan_table(record: Mapping[str, Any], layout: Mapping[str, int], received: int) -> RenderableType:
    """What a growth would do, from its record: sizes, parameters, FLOPs, strategies, verdict, bytes to move.

    Args:
        layout: sizes of the mesh axes that the bytes are for.
        received: bytes that each rank would receive.
    """
    table = plain_table("Growth: the plan", ["what"])
    for name in ("from", "to", "factor"):
        table.add_column(name, justify="right", no_wrap=True)
    names = {
        "embed": "width",
        "positions": "seq_len",
        "vocab_size": "vocab",
        "flops_per_token": "training FLOPs per token",
    }
    for key, before in record["from"].items():
        after = record["to"][key]
        counted = key in ("params", "flops_per_token")
        shown = [_count(value) if counted else str(value) for value in (before, after)]
        table.add_row(names.get(key, key), *shown, f"{after / before:.3g}" if after != before else "")
    noise = "none" if record["noise_db"] is None else f"{record['noise_db']:g} dB"
    added = ", ".join(str(layer) for layer in record["inserted"]) or "none"
    place = " ".join(f"{axis}={size}" for axis, size in layout.items())
    lines = [
        f"width {record['width']}, depth {record['depth']} (added layers: {added}), noise {noise}, "
        f"moments {record['moments']}, rate {record['rate']}",
        f"a live growth under {place}: each rank receives {_bytes(received)}",
    ]
    verdict = Text("exact", "green") if record["exact"] else Text(f"not exact: {record['reason']}", "yellow")
    return Group(table, *(Text(line) for line in lines), verdict)


def evaluation_table(scores: Mapping[str, Any]) -> Table:
    """Perplexities of one checkpoint, AP and AP+ (``evaluate``)."""
    table = plain_table("Perplexity", ["domain"])
    table.add_column("perplexity", justify="right", no_wrap=True)
    for domain, value in scores["ppl"].items():
        table.add_row(Text(domain), f"{value:.3f}")
    table.add_section()
    table.add_row("AP", f"{scores['ap']:.3f}")
    if scores["ap_plus"] is not None:
        table.add_row("AP+", f"{scores['ap_plus']:+.3f}")
    return table


def plain_table(title: str, columns: Iterable[str]) -> Table:
    """A table of the program's own style; ``columns`` are on the left."""
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


def _small(value: float | None) -> str:
    """A difference; one that was not measured has none."""
    return "-" if value is None else f"{value:.1e}"


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
