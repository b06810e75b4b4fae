"""A plan as tables for a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from elle_mp.observe.planning.plan import RankPlan, StagePlan
from elle_mp.observe.tables import _count, plain_table

MEMORY = ("masters", "optimizer", "gradients", "gathered", "activations", "buffers", "working", "total")
TRAFFIC = {
    "tp": "tp",
    "dp_gather": "dp gather",
    "dp_reduce": "dp reduce",
    "dp_replicas": "replicas",
    "pp": "pp",
    "cp": "cp",
    "total": "total",
}


def stream_tables(stages: list[StagePlan], world_size: int) -> RenderableType:
    """The stages, the heaviest rank of each, and the pipeline ranks of those that have several."""
    heaviest = [(stage.domain, stage.heaviest) for stage in stages]
    of = f"the heaviest of {world_size} ranks" if world_size > 1 else "the rank"
    parts: list[RenderableType] = [_stages(stages), _memory(f"Memory of {of} at the peak of a step", heaviest)]
    if any(item.traffic.total for _, item in heaviest):
        parts.append(_traffic("Bytes that this rank sends in a step", heaviest))
    for stage in stages:
        if len(stage.ranks) > 1:
            rows = [(str(item.rank), item) for item in stage.ranks]
            parts.append(_memory(f"Pipeline ranks of {stage.domain}: memory", rows, pipeline=True))
            parts.append(_traffic(f"Pipeline ranks of {stage.domain}: bytes sent in a step", rows, pipeline=True))
    return Group(*parts)


def _stages(stages: list[StagePlan]) -> Table:
    table = plain_table("The stream on paper", ["stage"])
    columns = ("params", "layers", "width", "ranks", "pp", "replicas", "shard", "cp", "tp", "micro", "FLOPs a step")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for stage in stages:
        setting, layout = stage.setting, stage.setting.parallel
        table.add_row(
            Text(stage.domain),
            _count(stage.parameters),
            str(setting.spec.layers),
            str(setting.spec.embed),
            *(
                str(size)
                for size in (setting.ranks, layout.pp, setting.replicas, layout.dp_shard, layout.cp, layout.tp)
            ),
            f"{setting.micro_batches} x {setting.micro}",
            f"{stage.flops:.3g}",
        )
    return table


def _memory(title: str, rows: list[tuple[str, RankPlan]], pipeline: bool = False) -> Table:
    table = _ranks_table(title, pipeline)
    host = any(item.memory.host for _, item in rows)
    columns = [*MEMORY, *["host"] * host]
    for name in ("params", *columns, *["waiting"] * pipeline):
        table.add_column(name, justify="right", no_wrap=True)
    for name, item in rows:
        cells = [_count(item.memory.parameters), *(_size(getattr(item.memory, column)) for column in columns)]
        if pipeline:
            cells.append("+".join(str(count) for count in item.memory.waiting))
        table.add_row(*_first_cells(name, item, pipeline), *cells)
    return table


def _traffic(title: str, rows: list[tuple[str, RankPlan]], pipeline: bool = False) -> Table:
    table = _ranks_table(title, pipeline)
    for name in (*TRAFFIC.values(), "FLOPs"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, item in rows:
        cells = [_size(size) if (size := getattr(item.traffic, column)) else "" for column in TRAFFIC]
        table.add_row(*_first_cells(name, item, pipeline), *cells, f"{item.flops:.3g}")
    return table


def _ranks_table(title: str, pipeline: bool) -> Table:
    return plain_table(title, ["rank", "layers"] if pipeline else ["stage"])


def _first_cells(name: str, item: RankPlan, pipeline: bool) -> list[str | Text]:
    if not pipeline:
        return [Text(name)]
    return [name, "+".join(str(count) for count in item.layers)]


def _size(value: float) -> str:
    """Bytes in the largest binary unit that leaves at least one."""
    for unit in ("", " KiB", " MiB", " GiB", " TiB"):
        if value < 1000:
            return f"{value:.3g}{unit}"
        value /= 1024
    return f"{value:.3g} PiB"
