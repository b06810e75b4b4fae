"""Tables and curves of growth_study.py: Markdown, and an SVG drawn by hand (no plotting library is needed)."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from xml.sax.saxutils import escape

from growth_study_arms import EQUAL_TOKENS, FROM_SCRATCH, NOT_GROWN, Arm

AUTO = {
    "gpt/width1.5": "weighted",
    "gpt/depth2": "zero_out",
    "gpt/width2": "replicate",
    "gpt/width1.5-long": "weighted",
    "gpt/depth2-long": "zero_out",
    "gpt/width2-long": "replicate",
    "gpt/inner2": "replicate",
    "llama/width1.5": "iso",
    "llama/width2": "replicate",
    "bert/depth2": "gate",
    "bert/width1.5": "weighted",
}
"""What ``auto`` takes in each group; the other arms are compared with it, seed by seed."""

T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}
"""Student's t, two-sided 95 %, by number of seeds."""

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Curve:
    """An arm over its seeds; losses are means of the seeds that have it."""

    arm: str
    results: tuple[Result, ...]

    @property
    def failed(self) -> str | None:
        """What went wrong, if anything did."""
        return next((str(item["failed"]) for item in self.results if "failed" in item), None)

    @property
    def final(self) -> dict[int, float]:
        """The last loss of each seed."""
        return {item["seed"]: item["points"][-1][2] for item in self.results if item["points"]}

    @property
    def jump(self) -> float | None:
        """Change of the loss by the growth itself."""
        values = [item["after"] - item["before"] for item in self.results if "after" in item]
        return mean(values) if values else None

    def after(self, steps: int) -> float | None:
        """The loss ``steps`` steps after the growth."""
        values = []
        for item in self.results:
            if "after" in item:
                first = next(point[1] for point in item["points"] if point[0] >= item["source_flops"] * (1 - 1e-9))
                values += [point[2] for point in item["points"] if point[1] == first + steps][-1:]
        return mean(values) if values else None

    @property
    def points(self) -> list[tuple[float, float]]:
        """(FLOPs, mean loss) where all seeds were evaluated."""
        rows = zip(*(item["points"] for item in self.results if item["points"]), strict=False)
        return [(row[0][0], mean(point[2] for point in row)) for row in rows]


def groups_of(results: Sequence[Result]) -> dict[str, list[Curve]]:
    """The arms of each group, best first; arms that failed are last."""
    found: dict[str, dict[str, list[Result]]] = {}
    for item in results:
        found.setdefault(f"{item['family']}/{item['group']}", {}).setdefault(item["arm"], []).append(item)
    out = {}
    for group, arms in found.items():
        curves = [Curve(arm, tuple(items)) for arm, items in arms.items()]
        auto = next((curve for curve in curves if curve.arm == AUTO.get(group)), None)
        out[group] = sorted(curves, key=lambda curve: score(curve, auto))
    return out


def score(curve: Curve, auto: Curve | None) -> float:
    """What arms are ranked by: the difference to ``auto`` over the seeds that both have, which may not be all."""
    if not curve.final:
        return float("inf")
    pairs = differences(curve, auto) if auto is not None else []
    return mean(pairs or curve.final.values())


def differences(curve: Curve, other: Curve) -> list[float]:
    """Final losses against those of another arm, seed by seed."""
    return [curve.final[seed] - other.final[seed] for seed in curve.final if seed in other.final]


def common(curves: Sequence[Curve]) -> list[Curve]:
    """The arms with the seeds that all of them have, so that their curves compare."""
    shared = set.intersection(*(set(curve.final) for curve in curves if curve.final))
    kept = [Curve(curve.arm, tuple(item for item in curve.results if item["seed"] in shared)) for curve in curves]
    return kept if shared else list(curves)


def spread(values: Sequence[float], signed: bool = False) -> str:
    """Mean and standard deviation over seeds."""
    text = f"{mean(values):+.3f}" if signed else f"{mean(values):.3f}"
    return f"{text} ± {stdev(values):.3f}" if len(values) > 1 else text


def clear(values: Sequence[float]) -> bool:
    """Whether the mean differs from zero by Student's t at 95 %."""
    count = len(values)
    return count > 1 and abs(mean(values)) > T_95.get(count, 2.6) * stdev(values) / sqrt(count)


def table(group: str, curves: Sequence[Curve], steps: int, every: int) -> str:
    """One group as Markdown, ranked by the loss at the end."""
    still = next((curve for curve in curves if curve.arm == NOT_GROWN), None)
    auto = next((curve for curve in curves if curve.arm == AUTO.get(group)), None)
    early, middle = every, steps // 2 // every * every or every
    lines = [
        f"| rank | arm | exact | jump at step 0 | loss after {early} steps | after {middle} | at the end | "
        "against `auto`, by seed | against not grown | seeds |",
        "|---" * 10 + "|",
    ]
    for rank, curve in enumerate(curves, start=1):
        if curve.failed or not curve.final:
            lines.append(f"| | {curve.arm} | | | | | {curve.failed} | | | |")
            continue
        plan = next((item["plan"] for item in curve.results if "plan" in item), None)
        exact = "" if plan is None else ("yes" if plan["exact"] else "no")
        jump = "" if curve.jump is None else f"{curve.jump:+.4f}"
        cells = ["" if value is None else f"{value:.3f}" for value in (curve.after(early), curve.after(middle))]
        name = f"{curve.arm} (`auto`)" if curve is auto else curve.arm
        lines.append(
            f"| {rank} | {name} | {exact} | {jump} | {cells[0]} | {cells[1]} | "
            f"**{spread(list(curve.final.values()))}** | {against(curve, auto)} | {against(curve, still)} | "
            f"{len(curve.final)} |"
        )
    return "\n".join(lines)


def longer(curves: Sequence[Curve]) -> int:
    """How many times the usual steps the arms of a group have."""
    item = curves[0].results[0]
    return Arm(item["family"], item["group"], item["arm"], {}).longer


def against(curve: Curve, other: Curve | None) -> str:
    """The difference to another arm paired by seed; a star where the seeds tell it from none."""
    if other is None or curve is other:
        return ""
    pairs = differences(curve, other)
    if not pairs:
        return ""
    return spread(pairs, signed=True) + (" *" if clear(pairs) else "")


COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#bcbd22", "#393b79")
PANEL, HEIGHT, MARGIN, LEGEND = 430, 300, 50, 200


def picture(groups: Mapping[str, Sequence[Curve]]) -> str:
    """Mean loss against training FLOPs, one panel a group, cut to where the grown models are."""
    rows = -(-len(groups) // 2)
    width, height = 2 * (PANEL + LEGEND + MARGIN) + 20, rows * (HEIGHT + 90) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="DejaVu Sans, Helvetica, sans-serif" font-size="11">',
        f'<clipPath id="panel"><rect width="{PANEL}" height="{HEIGHT}"/></clipPath>',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for index, (group, curves) in enumerate(groups.items()):
        x = MARGIN + index % 2 * (PANEL + LEGEND + MARGIN)
        parts.append(
            f'<g transform="translate({x} {40 + index // 2 * (HEIGHT + 90)})">{_panel(group, common(curves))}</g>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(group: str, curves: Sequence[Curve]) -> str:
    curves = [curve for curve in curves if curve.final]
    source = max((item["source_flops"] for curve in curves for item in curve.results), default=0.0)
    end = max(curve.points[-1][0] for curve in curves)
    left = source - 0.12 * (end - source)
    grown = [curve for curve in curves if curve.jump is not None] or curves
    lowest = min(mean(curve.final.values()) for curve in grown)
    before = mean(item["before"] for curve in curves for item in curve.results if "before" in item)
    low, high = lowest - 0.15 * (before - lowest), before + 0.35 * (before - lowest)

    def place(flops: float, loss: float) -> str:
        x = (flops - left) / (end - left) * PANEL
        return f"{x:.1f},{(high - loss) / (high - low) * HEIGHT:.1f}"

    parts = [
        f'<text x="0" y="-12" font-size="13" font-weight="bold">{escape(group)}: held-out loss, training FLOPs</text>',
        f'<rect width="{PANEL}" height="{HEIGHT}" fill="none" stroke="#999"/>',
        *_ticks(left, end, low, high),
    ]
    for number, curve in enumerate(curves):
        plain = curve.arm in (FROM_SCRATCH, NOT_GROWN, EQUAL_TOKENS)
        colour = "#000000" if plain else COLOURS[number % len(COLOURS)]
        dash = {FROM_SCRATCH: "6 3", NOT_GROWN: "2 2", EQUAL_TOKENS: "1 4"}.get(
            curve.arm, "none" if number < len(COLOURS) else "8 2 2 2"
        )
        line = " ".join(place(*point) for point in curve.points)
        style = f'fill="none" stroke="{colour}" stroke-width="1.6" stroke-dasharray="{dash}"'
        parts.append(f'<polyline points="{line}" clip-path="url(#panel)" {style}/>')
        y = 8 + number * 17
        parts.append(f'<polyline points="{PANEL + 8},{y} {PANEL + 30},{y}" {style}/>')
        label = f"{curve.arm} {mean(curve.final.values()):.3f}"
        parts.append(f'<text x="{PANEL + 34}" y="{y + 4}">{escape(label)}</text>')
    return "\n".join(parts)


def _ticks(left: float, end: float, low: float, high: float) -> list[str]:
    parts = []
    for step in range(5):
        flops, loss = left + (end - left) * step / 4, low + (high - low) * step / 4
        x, y = PANEL * step / 4, HEIGHT - HEIGHT * step / 4
        parts.append(f'<text x="{x:.0f}" y="{HEIGHT + 16}" text-anchor="middle" fill="#555">{flops:.2e}</text>')
        parts.append(f'<text x="-6" y="{y + 4:.0f}" text-anchor="end" fill="#555">{loss:.2f}</text>')
        parts.append(f'<line x1="0" x2="{PANEL}" y1="{y:.0f}" y2="{y:.0f}" stroke="#eee"/>')
    return parts


def write_report(
    results: Sequence[Result], settings: Mapping[str, Any], notes: Path | None = None, out: Path | None = None
) -> str:
    """The tables, printed; with ``out`` also a file, its picture beside it, and in it the text of ``notes``."""
    groups = groups_of(results)
    seeds = sorted({item["seed"] for item in results})
    text = "\n\n".join(
        f"## {group}\n\n{table(group, curves, longer(curves) * settings['steps'], longer(curves) * settings['every'])}"
        for group, curves in groups.items()
    )
    if out is not None:
        said = notes.read_text(encoding="utf-8").strip() + "\n\n" if notes else ""
        processor = f"{platform.machine()}, {os.cpu_count()} cores, one thread"
        head = (
            f"# Which growth is worth most\n\n`python benchmarks/growth_study.py DATA` "
            f"({date.today()}, {processor}, seeds {', '.join(map(str, seeds))})\n\n{said}"
            f"![Loss against training FLOPs]({out.with_suffix('.svg').name})\n\n"
        )
        out.write_text(f"{head}{text}\n", encoding="utf-8")
        out.with_suffix(".svg").write_text(picture(groups), encoding="utf-8")
    return text
