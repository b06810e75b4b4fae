"""Results as tables for a terminal of 100 columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

NARROWEST = 100
"""Columns that the tables need; a log or a pipe has no width of its own."""


def make_console(first: bool = True) -> Console:
    """Where results go: standard output of rank 0, wide enough for the tables when it is no terminal."""
    console = Console(quiet=not first, highlight=False)
    return console if console.is_terminal else Console(quiet=not first, highlight=False, width=NARROWEST)


def stages_table(results: Mapping[str, Any]) -> Table:
    """One row a stage: its sizes, the perplexity of each seen domain, AP and AP+ (``results.json``)."""
    stages = results["stages"]
    table = Table(title="Perplexity of every seen domain after each stage", box=SIMPLE_HEAD)
    table.add_column("stage", no_wrap=True)
    for name in ("layers", "heads", "width", "params", "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    for stage in stages:
        table.add_column(stage["domain"], justify="right", no_wrap=True)
    table.add_column("AP", justify="right", no_wrap=True)
    table.add_column("AP+", justify="right", no_wrap=True)
    for stage in stages:
        seen = [f"{stage['ppl'][other['domain']]:.2f}" if other["domain"] in stage["ppl"] else "" for other in stages]
        table.add_row(
            stage["domain"],
            str(stage["layers"]),
            str(stage["heads"]),
            str(stage["embed"]),
            _millions(stage["params"]),
            _millions(stage["tokens"]),
            *seen,
            f"{stage['ap']:.2f}",
            "" if stage["ap_plus"] is None else f"{stage['ap_plus']:+.2f}",
        )
    return table


def _millions(count: float) -> str:
    return f"{count / 1e6:.2f}M"


def growth_table(results: Mapping[str, Any]) -> Table:
    """One block a growth, with a line for each domain seen before it: perplexity before, after, and recovered."""
    table = Table(title="Growth: did the function stay?", box=SIMPLE_HEAD)
    table.add_column("for", no_wrap=True)
    table.add_column("layers", no_wrap=True)
    table.add_column("width", no_wrap=True)
    table.add_column("strategy", no_wrap=True)
    for name in ("largest logit diff", "domain", "before", "after", "recovered"):
        table.add_column(name, justify="right")
    for stage in results["stages"]:
        growth = stage["growth"]
        if growth is None:
            continue
        old, new, recovered = growth["from"], growth["to"], growth["ppl_recovered"]
        head = (
            stage["domain"],
            f"{old['layers']} > {new['layers']}",
            f"{old['embed']} > {new['embed']}",
            f"{growth['width']}/{growth['depth']}" + ("" if growth["exact"] else " (inexact)"),
            f"{growth['max_logit_diff']:.1e} ({growth['max_logit_diff_rel']:.1e} rel.)",
        )
        for index, domain in enumerate(growth["ppl_before"]):
            table.add_row(
                *(head if index == 0 else ("",) * len(head)),
                domain,
                f"{growth['ppl_before'][domain]:.4f}",
                f"{growth['ppl_after'][domain]:.4f}",
                "" if recovered is None else f"{recovered[domain]:.2f}",
            )
        table.add_section()
    return table


def evaluation_table(scores: Mapping[str, Any]) -> Table:
    """Perplexities of one checkpoint, AP and AP+ (``evaluate``)."""
    table = Table(title="Perplexity", box=SIMPLE_HEAD)
    table.add_column("domain")
    table.add_column("perplexity", justify="right")
    for domain, value in scores["ppl"].items():
        table.add_row(domain, f"{value:.3f}")
    table.add_section()
    table.add_row("AP", f"{scores['ap']:.3f}")
    table.add_row("AP+", "" if scores["ap_plus"] is None else f"{scores['ap_plus']:+.3f}")
    return table
