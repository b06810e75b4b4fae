"""``elle-mp profile kernels``: every op against its peers and against the machine's own ceilings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from elle_mp.errors import UserError
from elle_mp.observe.progress import count_progress
from elle_mp.observe.tables import make_console
from elle_mp.profiling.entry import Case, Entry
from elle_mp.profiling.machine import Ceilings, describe_machine, measure_ceilings
from elle_mp.profiling.measure import DifferenceError, Times, check_same, peak_memory, time_in_turns
from elle_mp.profiling.page import kernels_page
from elle_mp.profiling.registry import chosen
from elle_mp.profiling.results import KERNELS, write_results
from elle_mp.profiling.tables import difference_lines, kernels_table, machine_lines

OURS = "ours"
SECONDS = {True: 0.1, False: 1.0}
"""How long a pass of a case is measured, all sides together: with ``--quick``, and without."""


def profile_kernels(
    ops: Sequence[str],
    shapes: Sequence[str],
    dtypes: Sequence[str],
    json_file: Path | None,
    html_file: Path | None,
    threads: int | None,
    quick: bool,
) -> None:
    """Measures what was chosen, prints a table, and writes the results and a page where asked for.

    Raises:
        UserError: no such op, shape or type; a shape that an op cannot take; two sides that differ; a file that cannot
            be written.
    """
    entries = chosen(ops, shapes, dtypes, quick)
    if threads is not None:
        torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console = make_console()
    names = tuple(dict.fromkeys(dtype for entry in entries for dtype in entry.dtypes))
    ceilings = measure_ceilings(device, names)
    results: dict[str, Any] = {
        "kind": KERNELS,
        "machine": describe_machine(device),
        "ceilings": {"bandwidth": ceilings.bandwidth, "gemm": dict(ceilings.gemm)},
        "memory": "torch's allocator" if device.type == "cuda" else "allocations that torch's profiler reports",
        "rows": [],
    }
    cases = [(entry, shape, dtype) for entry in entries for shape in entry.shapes for dtype in entry.dtypes]
    with count_progress(console, "measuring", len(cases)) as begin:
        for entry, shape, dtype in cases:
            begin(f"{entry.name} {'x'.join(map(str, shape))} {dtype}")
            results["rows"] += measure(entry, shape, dtype, ceilings, device, SECONDS[quick])
    for line in machine_lines(results["machine"], results["ceilings"]):
        console.print(line, markup=False)
    console.print(kernels_table(results))
    for line in difference_lines(results):
        console.print(line, markup=False)
    write_results(results, json_file, html_file, kernels_page)


def measure(
    entry: Entry, shape: tuple[int, ...], dtype: str, ceilings: Ceilings, device: torch.device, seconds: float
) -> list[dict[str, Any]]:
    """The rows of one op, shape and type: every pass, every side.

    Raises:
        UserError: the op does not take this shape, or a peer computes something else.
    """
    name = f"{entry.name} {'x'.join(map(str, shape))} {dtype}"
    rows = []
    try:
        case = entry.make(shape, getattr(torch, dtype), device)
        for backward in (False, True) if entry.backward else (False,):
            far = check_same(case, backward, getattr(torch, dtype))
            found = measure_pass(case, backward, ceilings, dtype, device, seconds)
            rows += [row | {"difference": far.get(row["side"])} for row in found]
    except DifferenceError as error:
        raise UserError(f"{name}: not measured, since {error}") from None
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{name}: cannot be run: {str(error).splitlines()[0]}") from None
    place = {"op": entry.name, "shape": "x".join(map(str, shape)), "dtype": dtype}
    return [place | row for row in rows]


def measure_pass(
    case: Case, backward: bool, ceilings: Ceilings, dtype: str, device: torch.device, seconds: float
) -> list[dict[str, Any]]:
    """The rows of one pass: ours first."""
    runs = {OURS: case.ours, **case.peers, **case.yardsticks}
    times = time_in_turns(runs, backward, seconds, device)
    moved, operations = case.moved[backward], case.operations[backward]
    least = ceilings.least_seconds(moved, operations, dtype)
    rows = []
    for name, run in runs.items():
        rows.append(
            {
                "pass": "forward+backward" if backward else "forward",
                "side": name,
                **row_of(times[name], moved, operations, least),
                "ratio": times[name].median / times[OURS].median,
                "peak_bytes": peak_memory(run, backward, device),
                "moved": moved,
                "operations": operations,
            }
        )
    return rows


def row_of(times: Times, moved: float, operations: float, least: float) -> dict[str, float]:
    """Times, and the rates that they mean."""
    return {
        "seconds": times.median,
        "low": times.low,
        "high": times.high,
        "bytes_per_second": moved / times.median,
        "flops": operations / times.median,
        "of_ceiling": least / times.median,
    }
