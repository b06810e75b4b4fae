"""How the layers of a stage's model are shared out over a pipeline when that is measured."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from elle_mp.models.pipeline import LanguageModel, stage_parts
from elle_mp.parallel.mesh import AXES, Grid
from elle_mp.parallel.pipeline import Costs

BEARING = ("sequence_parallel", "recompute", "apex", "reshard_after_forward")
"""Settings of a layout, its axes apart, that costs depend on."""


def wants_costs(grid: Grid) -> bool:
    """Whether layers are shared out by what is measured."""
    return grid.parallel.split == "measured" and grid.pipeline_stages > 1


def remembered_costs(grid: Grid, record: dict[str, Any] | None) -> Costs | None:
    """Those in the record of a checkpoint, so that a run goes on with the split it had; ``None`` where there are none,
    or they were measured under another layout."""
    return None if record is None or record["layout"] != _layout(grid) else Costs(**record["seconds"])


def split_record(model: LanguageModel) -> dict[str, Any] | None:
    """For results and checkpoints: the layers of each pipeline stage, the measured seconds, and under which layout;
    ``None`` where nothing was measured."""
    grid = model.grid
    if grid.costs is None:
        return None
    layers = [len(part.layers) for part in stage_parts(model.spec, grid)]
    return {"layers": layers, "seconds": asdict(grid.costs), "layout": _layout(grid)}


def split_line(domain: str, record: dict[str, Any]) -> str:
    """The record in a line."""
    costs = Costs(**record["seconds"])
    first, last = costs.in_layers()
    return (
        f"split for {domain}: {' + '.join(map(str, record['layers']))} layers; embeddings take {first:.2f} layers, "
        f"the head {last:.2f}, a layer {1000 * costs.layer:.3g} ms a micro-batch"
    )


def _layout(grid: Grid) -> dict[str, Any]:
    return {axis: grid.size(axis) for axis in AXES} | {key: getattr(grid.parallel, key) for key in BEARING}
