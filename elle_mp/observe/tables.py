"""Results as tables for a terminal of 100 columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table


def stages_table(results: Mapping[str, Any]) -> Table:
    """One row a stage: its sizes, the perplexity of each seen domain, AP and AP+ (``results.json``)."""
    stages = results["stages"]
    table = Table(title="Stages: perplexity of every seen domain after each stage")
    table.add_column("stage")
    for name in ("layers", "heads", "width", "params", "tokens"):
        table.add_column(name, justify="right")
    for stage in stages:
        table.add_column(stage["domain"], justify="right")
    table.add_column("AP", justify="right")
    table.add_column("AP+", justify="right")
    for stage in stages:
        seen = [f"{stage['ppl'][other['domain']]:.2f}" if other["domain"] in stage["ppl"] else "" for other in stages]
        table.add_row(
            stage["domain"],
            str(stage["layers"]),
            str(stage["heads"]),
            str(stage["embed"]),
            f"{stage['params'] / 1e6:.2f}M",
            f"{stage['tokens'] / 1e6:.2f}M",
            *seen,
            f"{stage['ap']:.2f}",
            "" if stage["ap_plus"] is None else f"{stage['ap_plus']:+.2f}",
        )
    return table


def growth_table(results: Mapping[str, Any]) -> Table:
    """One row for each domain seen before a growth: its perplexity before, after, and after recovery."""
    table = Table(title="Growth: what it changed")
    for name in ("before", "layers", "width", "how", "exact"):
        table.add_column(name)
    for name in ("logit diff", "domain", "ppl before", "after", "recovered", "seconds"):
        table.add_column(name, justify="right")
    for stage in results["stages"]:
        growth = stage["growth"]
        if growth is None:
            continue
        old, new = growth["from"], growth["to"]
        for index, domain in enumerate(growth["ppl_before"]):
            first = index == 0
            recovered = growth["ppl_recovered"]
            table.add_row(
                stage["domain"] if first else "",
                f"{old['layers']} > {new['layers']}" if first else "",
                f"{old['embed']} > {new['embed']}" if first else "",
                f"{growth['width']}\n{growth['depth']}" if first else "",
                ("yes" if growth["exact"] else "no") if first else "",
                f"{growth['max_logit_diff_rel']:.1e}" if first else "",
                domain,
                f"{growth['ppl_before'][domain]:.4f}",
                f"{growth['ppl_after'][domain]:.4f}",
                "" if recovered is None else f"{recovered[domain]:.2f}",
                f"{growth['seconds']:.2f}" if first else "",
            )
    return table


def evaluation_table(scores: Mapping[str, Any]) -> Table:
    """Perplexities of one checkpoint, AP and AP+ (``evaluate``)."""
    table = Table(title="Perplexity")
    table.add_column("domain")
    table.add_column("perplexity", justify="right")
    for domain, value in scores["ppl"].items():
        table.add_row(domain, f"{value:.3f}")
    table.add_section()
    table.add_row("AP", f"{scores['ap']:.3f}")
    table.add_row("AP+", "" if scores["ap_plus"] is None else f"{scores['ap_plus']:+.3f}")
    return table
