"""The tables show what results.json holds, inside 100 columns."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console, RenderableType

from elle_mp.observe.tables import evaluation_table, growth_table, make_console, stages_table


def _text(table: RenderableType, width: int = 100) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(table)
    return file.getvalue()


def _results(domains: list[str]) -> dict[str, Any]:
    """A run with large numbers everywhere."""
    stages = []
    for index, domain in enumerate(domains):
        seen = domains[: index + 1]
        sizes = {"layers": 12 + index, "heads": 12 + index, "embed": 1024 + 128 * index}
        growth = {
            "width": "weighted",
            "depth": "affine_migrate",
            "exact": index != 2,
            "reason": None if index != 2 else "random maps",
            "from": sizes,
            "to": {key: value * 2 for key, value in sizes.items()},
            "max_logit_diff": 5.67e-6,
            "max_logit_diff_rel": 4.32e-7,
            "ppl_before": {name: 1234.5671 for name in seen[:-1]},
            "ppl_after": {name: 1234.5684 for name in seen[:-1]},
            "ppl_recovered": {name: 1200.5 for name in seen[:-1]} if index != 1 else None,
            "seconds": 1234.567,
            "bytes_communicated": 123 * 1024 * 1024 if index == 2 else 0,
        }
        stages.append(
            {
                "domain": domain,
                **sizes,
                "params": 123_456_789 * (index + 1),
                "tokens": 16_000_000_000,
                "ppl": {name: 1234.5 + place for place, name in enumerate(seen)},
                "ap": 1111.1,
                "ap_plus": -123.456 if index else None,
                "growth": growth if index else None,
            }
        )
    return {"ap": 1.0, "ap_plus": 1.0, "stages": stages}


def _rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_every_perplexity_stands_in_its_row() -> None:
    text = _text(stages_table(_results(["wb", "news", "reviews", "bio", "cs"])))
    rows = _rows(text)
    assert ["wb", "12", "12", "1024", "123M", "16B", "1234", "1111"] in rows
    reviews = ["reviews", "14", "14", "1280", "370M", "16B", "1234", "1236", "1236", "1111", "-123.5"]
    assert reviews in rows
    assert [
        "stage",
        "layers",
        "heads",
        "width",
        "params",
        "tokens",
        "wb",
        "news",
        "reviews",
        "bio",
        "cs",
        "AP",
        "AP+",
    ] in rows
    assert "…" not in text and max(map(len, text.splitlines())) <= 100


def test_every_growth_stands_in_its_row() -> None:
    text = _text(growth_table(_results(["wb", "news", "reviews", "bio", "cs"])))
    rows = _rows(text)
    numbers = ["5.7e-06", "4.3e-07", "1234.57"]
    assert ["news", "13->26", "13->26", "1152->2304", "weighted", "yes", *numbers, "0"] in rows
    assert ["reviews", "14->28", "14->28", "1280->2560", "weighted", "no", *numbers, "123", "MiB"] in rows
    assert text.count("affine_migrate") == 4
    assert "reviews: not exact: random maps" in text
    assert ["news", "wb", "1234.5671", "1234.5684"] in rows
    assert ["cs", "wb", "1234.5671", "1234.5684", "1200.50"] in rows
    assert text.count("1200.50") == 2 + 3 + 4
    assert "…" not in text and max(map(len, text.splitlines())) <= 100


def test_a_diverged_model_and_odd_domain_names_are_shown() -> None:
    results = _results(["[red]a", "b:smile:"])
    results["stages"][1]["ppl"] = {"[red]a": 1.5e12, "b:smile:": None}
    text = _text(stages_table(results))
    assert "[red]a" in text and "b:smile:" in text
    assert next(row for row in _rows(text) if row[:1] == ["b:smile:"])[6:8] == ["2e+12", "-"]


def test_evaluation() -> None:
    with_both = _rows(_text(evaluation_table({"ppl": {"docs": 12.3456, "code": 4.5}, "ap": 6.7, "ap_plus": 0.25})))
    assert ["docs", "12.346"] in with_both and ["AP", "6.700"] in with_both and ["AP+", "+0.250"] in with_both
    alone = _text(evaluation_table({"ppl": {"docs": 12.3}, "ap": 12.3, "ap_plus": None}))
    assert "AP+" not in alone


def test_only_the_first_rank_prints() -> None:
    assert make_console(first=False).quiet and not make_console(first=True).quiet
