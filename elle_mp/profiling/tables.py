"""The profiler's results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from elle_mp.observe.tables import plain_table
from elle_mp.profiling.measure import TOLERANCE

NUMBERS = ("ms", "spread", "ratio", "GB/s", "TFLOP/s", "of ceiling", "peak MB")
SHORT = {"forward": "fwd", "forward+backward": "fwd+bwd"}


def machine_lines(machine: Mapping[str, Any], ceilings: Mapping[str, Any]) -> list[str]:
    """The machine and its ceilings, a line each."""
    where = machine["gpu"] or machine["processor"]
    gemm = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, rate in ceilings["gemm"].items())
    bandwidth = ceilings.get("bandwidth")
    copy = f"copies {bandwidth / 1e9:.1f} GB/s (read and written), " if bandwidth else ""
    return [
        f"{where}: {machine['threads']} threads on {machine['cores']} cores, load {machine['load']:.1f} at the start",
        f"elle_mp {machine['elle_mp']} ({machine['commit'] or 'no commit'}), torch {machine['torch']}, "
        f"instructions {machine['instructions']}, {machine['date']}",
        f"ceilings: {copy}multiplies {gemm}",
    ]


def kernel_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The numbers of a row, as of :data:`NUMBERS`; the spread is that of the quartiles, in the median."""
    return (
        _three(row["seconds"] * 1e3),
        f"{(row['high'] - row['low']) / row['seconds']:.0%}",
        "" if row["side"] == "ours" else f"{row['ratio']:.2f}",
        _three(row["bytes_per_second"] / 1e9),
        _three(row["flops"] / 1e12) if row["flops"] else "",
        f"{row['of_ceiling']:.0%}",
        _three(row["peak_bytes"] / 1e6),
    )


def _three(value: float) -> str:
    """Three digits; more where a whole number has more."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def kernels_table(results: Mapping[str, Any]) -> Table:
    """One row a side; ``ratio`` is its time in ours, above 1 where ours is faster."""
    table = plain_table(
        "Ops against their peers (ratio: the peer's time in ours)", ["op", "shape", "dtype", "pass", "side"]
    )
    for name in NUMBERS:
        table.add_column(name, justify="right", no_wrap=True)
    last: tuple[str, ...] = ()
    for row in results["rows"]:
        place = tuple(row[key] for key in ("op", "shape", "dtype", "pass"))
        same = place[:3] == last[:3]
        shown = [*(Text("" if same else text) for text in place[:3]), Text("" if place == last else SHORT[place[3]])]
        if last and not same:
            table.add_section()
        table.add_row(*shown, Text(row["side"], "bold" if row["side"] == "ours" else ""), *kernel_cells(row))
        last = place
    return table


def difference_lines(results: Mapping[str, Any]) -> list[str]:
    """The peers whose results are further from ours than the reference may be."""
    return [
        f"{row['side']} differs from ours by {row['difference']:.1%} of the largest entry: {row['op']} {row['shape']} "
        f"{row['dtype']} {row['pass']}"
        for row in results["rows"]
        if row["difference"] is not None and row["difference"] > TOLERANCE[getattr(torch, row["dtype"])]
    ]


def step_table(results: Mapping[str, Any]) -> Table:
    """One row a part of the step: forward, backward and share."""
    table = plain_table("One training step", ["part", "pass"])
    for name in ("ms", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in results["rows"]:
        table.add_row(row["part"], row["pass"], f"{row['seconds'] * 1e3:.2f}", f"{row['share']:.1%}")
    return table


def comparison_table(keys: Sequence[str], pairs: Mapping[tuple[str, ...], tuple[float, float]]) -> Table:
    """One row for each thing that both files have; a ratio above 1: the second file is faster."""
    table = plain_table("The first file's time in the second's (above 1: the second is faster)", keys)
    for name in ("first ms", "second ms", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for key, (before, after) in pairs.items():
        ratio = f"{before / after:.3f}" if after else "-"
        table.add_row(*map(Text, key), f"{before * 1e3:.3g}", f"{after * 1e3:.3g}", ratio)
    return table
