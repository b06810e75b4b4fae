"""``elle-mp profile compare``: two files of results, number by number."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elle_mp.errors import UserError
from elle_mp.observe.tables import make_console
from elle_mp.profiling.results import KERNELS, read_results
from elle_mp.profiling.tables import comparison_table

KEYS = {True: ("op", "shape", "dtype", "pass", "side"), False: ("part", "pass")}


def compare(first: Path, second: Path) -> None:
    """Prints how much faster the second is, for everything that both measured, and what differs around them.

    Raises:
        UserError: a file is broken, or they are not of one kind, or have nothing in common.
    """
    a, b = read_results(first), read_results(second)
    if a["kind"] != b["kind"]:
        raise UserError(f"{first} is of '{a['kind']}', {second} of '{b['kind']}': give two files of one kind")
    keys = KEYS[a["kind"] == KERNELS]
    before, after = seconds_by(a, keys, first), seconds_by(b, keys, second)
    common = [key for key in before if key in after]
    if not common:
        raise UserError(f"{first} and {second} have no row in common ({', '.join(keys)})")
    console = make_console()
    for line in differences(a["machine"], b["machine"]):
        console.print(line, markup=False)
    console.print(comparison_table(keys, {key: (before[key], after[key]) for key in common}))
    for path, count in ((first, len(before) - len(common)), (second, len(after) - len(common))):
        if count:
            console.print(f"only in {path}: {count} rows", markup=False)


def seconds_by(results: Mapping[str, Any], keys: tuple[str, ...], path: Path) -> dict[tuple[str, ...], float]:
    """Seconds of every row, by what it is of.

    Raises:
        UserError: a row has no name, or no time.
    """
    try:
        return {tuple(str(row[key]) for key in keys): float(row["seconds"]) for row in results["rows"]}
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: the results are broken: a row lacks one of {', '.join(keys)}, seconds") from None


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What is not the same around two measurements, a line each."""
    keys = [key for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)]
    return [f"{key}: {a.get(key)} -> {b.get(key)}" for key in keys]
