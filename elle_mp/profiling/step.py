"""``elle-mp profile step``: the training steps of a configuration, broken into parts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from elle_mp.config import Config
from elle_mp.config_file import load_config
from elle_mp.config_layout import check_layout
from elle_mp.data.batches import Batch
from elle_mp.data.files import file_errors
from elle_mp.errors import UserError
from elle_mp.growth.stages import stage_specs
from elle_mp.models.build import Precision
from elle_mp.models.flops import MASKED_SHARE, training_flops_per_token
from elle_mp.models.spec import ModelSpec
from elle_mp.models.transformer import IGNORED
from elle_mp.observe.tables import make_console
from elle_mp.parallel.agreement import on_first_rank, on_first_rank_then_all
from elle_mp.parallel.mesh import make_grid, start_distributed
from elle_mp.profiling.attribution import Breakdown, Event, attribute
from elle_mp.profiling.machine import describe_machine, synchronise
from elle_mp.profiling.page import step_page
from elle_mp.profiling.ranges import DATA, STEP, named, ranges
from elle_mp.profiling.results import STEP as KIND
from elle_mp.profiling.results import write_results
from elle_mp.profiling.tables import machine_lines, step_table
from elle_mp.stream.domains import vocabulary_size
from elle_mp.train.engine import make_optimizer
from elle_mp.train.speed import gemm_rate
from elle_mp.train.trainer import Trainer, rows_of

WARM_STEPS = 2


def profile_step(
    config_path: Path,
    overrides: Sequence[str],
    stage: int,
    steps: int,
    trace: Path | None,
    json_file: Path | None,
    html_file: Path | None,
) -> None:
    """Runs ``steps`` steps of a stage as they are, and as many under the profiler; prints where rank 0's time goes.

    The tokens are random and so are the weights: neither changes the time of a step.

    Raises:
        UserError: the configuration is wrong, it has no such stage, or a file cannot be written.
    """
    device = start_distributed()
    console = make_console(dist.get_rank() == 0)
    try:
        config = on_first_rank_then_all(lambda: _checked(config_path, overrides, stage))
        run = _Run(config, stage, device)
        plain = [run.step() for _ in range(WARM_STEPS + steps)][WARM_STEPS:]
        with ranges(run.optimizer.model, run.optimizer), profile(activities=_activities(device)) as watched:
            watched_seconds = [run.step() for _ in range(steps)]
        found = attribute(_events(watched))
        results = run.results(plain, watched_seconds, found)
        for line in (*machine_lines(results["machine"], results["ceilings"]), *results["summary"]):
            console.print(line, markup=False)
        console.print(step_table(results))
        if device.type == "cuda":
            console.print(f"nsys profile -t cuda,nvtx,osrt elle-mp profile step {config_path}", markup=False)
        on_first_rank(lambda: _write(results, watched, trace, json_file, html_file))
    finally:
        dist.destroy_process_group()


def _write(results: dict[str, Any], watched: Any, trace: Path | None, json: Path | None, html: Path | None) -> None:
    write_results(results, json, html, step_page)
    if trace is not None:
        with file_errors("write", trace):
            trace.parent.mkdir(parents=True, exist_ok=True)
            beside = trace.with_name(f".tmp-{trace.name}")  # torch goes by the ending
            try:
                watched.export_chrome_trace(str(beside))
                beside.replace(trace)
            finally:
                beside.unlink(missing_ok=True)


def _checked(path: Path, overrides: Sequence[str], stage: int) -> Config:
    config = load_config(path, overrides)
    check_layout(config, dist.get_world_size())
    if not 0 <= stage < len(config.stream):
        raise UserError(f"--stage {stage}: the stream has stages 0 to {len(config.stream) - 1}")
    return config


class _Run:
    """The model of a stage, with what a step needs."""

    def __init__(self, config: Config, stage: int, device: torch.device) -> None:
        self.spec: ModelSpec = stage_specs(config, vocabulary_size(config))[stage]
        grid = make_grid(config.stage_parallel(stage), device)
        if not grid.active:
            raise UserError(f"--stage {stage}: its layout leaves ranks out; start as many as it wants")
        self.device = device
        self.precision = Precision.named(config.precision)
        self.batch = config.stage_batch(stage)
        self.optimizer = make_optimizer(self.spec, grid, self.precision, config.stage_optim(stage))
        self.optimizer.initialise(config.run.seed)
        for part in self.optimizer.model.parts:
            if part.norm_stats is not None:
                part.norm_stats.fill_(1.0 / self.spec.embed)
        self.trainer = Trainer(self.optimizer.model, self.optimizer, self.batch.micro, config.run.seed)
        self.rows = rows_of(grid, self.batch.global_)
        self.number = 0

    def step(self) -> float:
        """One step on random tokens; its seconds."""
        synchronise(self.device)
        began = time.perf_counter()
        with named(STEP):
            with named(DATA):
                rows = self._rows()
            self.trainer.step(rows, 1e-3)
            synchronise(self.device)
        self.number += 1
        return time.perf_counter() - began

    def _rows(self) -> Batch:
        generator = torch.Generator().manual_seed(self.number)
        size = (self.batch.global_, self.spec.text_length)
        tokens = torch.randint(0, self.spec.softmax_vocab, size, generator=generator)
        targets = tokens.roll(-1, 1)
        if not self.spec.causal:
            targets = torch.where(torch.rand(size, generator=generator) < MASKED_SHARE, tokens, IGNORED)
        key = torch.arange(size[0]) + self.number * size[0]
        return Batch(tokens, targets, torch.zeros(size[0], dtype=torch.int64), key).rows(*self.rows)

    def results(self, plain: list[float], watched: list[float], found: Breakdown) -> dict[str, Any]:
        """What the files hold."""
        rate = gemm_rate(self.device, self.precision.compute)
        dtype = str(self.precision.compute).removeprefix("torch.")
        flops = training_flops_per_token(self.spec) * self.spec.positions * self.batch.global_
        seconds = statistics.median(plain)
        mfu = flops / seconds / (rate * dist.get_world_size())
        count = len(watched)
        rows = [
            {"part": part, "pass": which, "seconds": spent / 1e6 / count, "share": spent / found.total}
            for (part, which), spent in sorted(found.parts.items(), key=lambda item: -item[1])
        ]
        overlap = found.hidden / found.in_flight if found.in_flight and dist.get_world_size() > 1 else None
        told = "" if overlap is None else f"; of the time that collectives are under way {overlap:.0%} is hidden"
        summary = [
            f"a step: {seconds * 1e3:.1f} ms, MFU {mfu:.1%} of the measured {dtype} product on {dist.get_world_size()} "
            f"ranks, {self.batch.global_ * self.spec.text_length / seconds:,.0f} tokens/s",
            f"under the profiler: {statistics.fmean(watched) * 1e3:.1f} ms{told}",
        ]
        return {
            "kind": KIND,
            "machine": describe_machine(self.device) | {"ranks": dist.get_world_size()},
            "ceilings": {"gemm": {dtype: rate}},
            "step_seconds": seconds,
            "profiled_seconds": statistics.fmean(watched),
            "mfu": mfu,
            "overlap": overlap,
            "summary": summary,
            "rows": rows,
        }


def _activities(device: torch.device) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]


def _events(watched: Any) -> list[Event]:
    return [
        Event(
            item.name,
            item.time_range.start,
            item.time_range.end,
            item.thread,
            item.sequence_nr,
            item.is_async or item.name.startswith(("gloo:", "nccl:")),
        )
        for item in watched.events()
    ]
