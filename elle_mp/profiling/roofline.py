"""The roofline (Williams et al., CACM 2009) as SVG: what each op reaches under the machine's ceilings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from math import ceil, floor, log10
from typing import Any

WIDTH, HEIGHT = 980, 520
LEFT, TOP, RIGHT, BOTTOM = 80, 20, 700, 460
COLOURS = ("#0b62a4", "#c2410c", "#15803d", "#7e22ce", "#b91c1c", "#0f766e", "#a16207", "#be185d", "#475569", "#1d4ed8")
DASHES = ("", "7 4", "2 3", "8 3 2 3")


class Axes:
    """Both axes are logarithmic: operations per byte, and GFLOP/s."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.x0, self.x1 = floor(log10(x[0])), ceil(log10(x[1]))
        self.y0, self.y1 = floor(log10(y[0])), ceil(log10(y[1]))

    def x(self, value: float) -> float:
        """Place of an intensity."""
        return LEFT + (log10(value) - self.x0) / max(self.x1 - self.x0, 1) * (RIGHT - LEFT)

    def y(self, value: float) -> float:
        """Place of a rate."""
        return BOTTOM - (log10(value) - self.y0) / max(self.y1 - self.y0, 1) * (BOTTOM - TOP)


def roofline(results: Mapping[str, Any]) -> str:
    """Our side of every op that computes, as a point; of those that only move memory the page's table tells."""
    rows = [row for row in results["rows"] if row["side"] == "ours" and row["operations"]]
    if not rows:
        return "<p>No roofline: the ops measured here only move memory; the column GB/s tells how fast.</p>"
    bandwidth, gemm = results["ceilings"]["bandwidth"], results["ceilings"]["gemm"]
    ridges = [rate / bandwidth for rate in gemm.values()]
    intensities = [row["operations"] / row["moved"] for row in rows]
    rates = [row["flops"] / 1e9 for row in rows]
    left = min(*ridges, *intensities) / 4
    axes = Axes(
        (left, max(*ridges, *intensities) * 2),
        (min(*rates, left * bandwidth / 1e9), max(*rates, *(rate / 1e9 for rate in gemm.values())) * 1.2),
    )
    parts = [*_grid(axes), *_ceilings(axes, bandwidth, gemm), *_points(axes, rows)]
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Roofline" font-size="12">'
        + "".join(parts)
        + "</svg>"
    )


def _grid(axes: Axes) -> Iterator[str]:
    for power in range(axes.x0, axes.x1 + 1):
        x = axes.x(10.0**power)
        yield f'<path d="M{x:.1f} {TOP}V{BOTTOM}" stroke="#ddd"/>'
        yield f'<text x="{x:.1f}" y="{BOTTOM + 18}" text-anchor="middle">{10.0**power:g}</text>'
    for power in range(axes.y0, axes.y1 + 1):
        y = axes.y(10.0**power)
        yield f'<path d="M{LEFT} {y:.1f}H{RIGHT}" stroke="#ddd"/>'
        yield f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g}</text>'
    yield f'<text x="{(LEFT + RIGHT) / 2}" y="{BOTTOM + 42}" text-anchor="middle">operations per byte</text>'
    middle = (TOP + BOTTOM) / 2
    yield f'<text transform="translate(22 {middle}) rotate(-90)" text-anchor="middle">GFLOP/s</text>'


def _ceilings(axes: Axes, bandwidth: float, gemm: Mapping[str, float]) -> Iterator[str]:
    for index, (dtype, rate) in enumerate(gemm.items()):
        # The slope begins where it enters the picture: at the left edge, or on the bottom.
        begin = max(10.0**axes.x0, 10.0**axes.y0 * 1e9 / bandwidth)
        ridge, y = rate / bandwidth, axes.y(rate / 1e9)
        path = f"M{axes.x(begin):.1f} {axes.y(begin * bandwidth / 1e9):.1f}L{axes.x(ridge):.1f} {y:.1f}H{RIGHT}"
        dash = DASHES[index % len(DASHES)]
        yield f'<path d="{path}" fill="none" stroke="#111" stroke-width="1.6" stroke-dasharray="{dash}"/>'
        yield f'<text x="{RIGHT - 4}" y="{y - 6:.1f}" text-anchor="end">{escape(dtype)} product</text>'


def _points(axes: Axes, rows: list[dict[str, Any]]) -> Iterator[str]:
    series = list(dict.fromkeys((row["op"], row["dtype"]) for row in rows))
    for row in rows:
        number = series.index((row["op"], row["dtype"]))
        x, y = axes.x(row["operations"] / row["moved"]), axes.y(row["flops"] / 1e9)
        told = f"{row['op']} {row['shape']} {row['dtype']} {row['pass']}: {row['of_ceiling']:.0%} of the ceiling"
        yield _mark(x, y, number, row["pass"] == "forward", told)
    for number, (op, dtype) in enumerate(series):
        y = TOP + 14 + 20 * number
        yield _mark(RIGHT + 22, y - 4, number, False, op)
        yield f'<text x="{RIGHT + 34}" y="{y}">{escape(op)}, {escape(dtype)}</text>'
    y = TOP + 22 + 20 * len(series)
    yield f'<text x="{RIGHT + 16}" y="{y}">hollow: forward; filled: with backward</text>'


def _mark(x: float, y: float, number: int, hollow: bool, told: str) -> str:
    colour = COLOURS[number % len(COLOURS)]
    fill = "#fff" if hollow else colour
    title = f"<title>{escape(told)}</title>"
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{fill}" stroke="{colour}" stroke-width="2">{title}</circle>'
