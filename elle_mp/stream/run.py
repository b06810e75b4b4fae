"""``elle-mp pretrain``: a whole stream, from the configuration to the table of results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from elle_mp.config import Config
from elle_mp.config_file import load_config
from elle_mp.config_layout import check_layout
from elle_mp.growth.stages import stage_specs
from elle_mp.models.build import Precision
from elle_mp.observe.journal import Journal
from elle_mp.observe.tables import growth_table, make_console, stages_table
from elle_mp.parallel.agreement import check_same, on_first_rank, on_first_rank_then_all
from elle_mp.parallel.mesh import start_distributed
from elle_mp.parallel.time_limits import TimeLimits
from elle_mp.parallel.watch import Watch
from elle_mp.stream.domains import check_data, open_domains, vocabulary_size
from elle_mp.stream.run_directory import finished_state, open_run_directory, restore_results
from elle_mp.stream.runner import StreamRunner
from elle_mp.stream.state import DONE, RunState
from elle_mp.train.apex import check_apex
from elle_mp.train.cpu_adam import check_cpu_adam
from elle_mp.train.signals import ending
from elle_mp.train.speed import gemm_rate

STOPPED = "stopped in stage {stage} ({domain}, {phase}) after step {step}; run the same command again to go on"


def pretrain(config_path: Path, overrides: Sequence[str] = ()) -> None:
    """Runs the stream of a configuration, or goes on with it where its run directory stands.

    Raises:
        UserError: anything in the configuration, the data or the run directory is wrong.
    """
    device = start_distributed()
    console = make_console(dist.get_rank() == 0)
    try:
        with Watch() as watch:
            # Rank 0 reads first and the others hear of its failure, so that it has spoken before the launcher ends all.
            config = on_first_rank_then_all(lambda: checked_config(config_path, overrides))
            watch.folder = Path(config.run.dir)
            watch.limits.use(config.parallel)
            _go_on(config, device, console, watch.limits)
    finally:
        dist.destroy_process_group()


def _go_on(config: Config, device: torch.device, console: Console, limits: TimeLimits) -> None:
    """Goes on with a run where it stands, and says what came of it."""
    run_dir = Path(config.run.dir)
    state = on_first_rank_then_all(lambda: finished_state(config))
    if state is None:
        state = _run(config, run_dir, device, console, limits)
    else:
        on_first_rank(lambda: restore_results(run_dir, state))
    if state.phase == DONE:
        print_results(console, state.results())
        console.print(f"results: {run_dir / 'results.json'}")
    else:
        domain = config.stream[state.stage].domain
        console.print(STOPPED.format(stage=state.stage, domain=domain, phase=state.phase, step=state.step))


def _run(config: Config, run_dir: Path, device: torch.device, console: Console, limits: TimeLimits) -> RunState:
    """Goes on with a run to its end or until a signal; returns where it stands then."""
    first = dist.get_rank() == 0
    on_first_rank(lambda: check_data(config))
    on_first_rank(lambda: open_run_directory(config))
    check_cpu_adam(config, lambda line: console.print(line, markup=False))
    peak = gemm_rate(device, Precision.named(config.precision).compute) * dist.get_world_size()
    with ending(clean_up=first):
        domains = open_domains(config, run_dir, console.print)
    journal = Journal(run_dir, first, config.log.every, config.log.tensorboard, peak)
    try:
        runner = StreamRunner(config, domains, run_dir, device, journal, limits)
        check_same("the configuration", config.model_dump_json())
        check_same("where the run stands", json.dumps(runner.state.to_json()))
        runner.run()
    finally:
        journal.close()
    return runner.state


def print_results(console: Console, results: Mapping[str, Any]) -> None:
    """The table of stages and, when there was one, that of growths."""
    console.print(stages_table(results))
    if any(stage["growth"] for stage in results["stages"]):
        console.print(growth_table(results))


def checked_config(path: Path, overrides: Sequence[str]) -> Config:
    """The configuration, with every layout and every growth of the stream checked.

    Raises:
        UserError: something in it is wrong.
    """
    config = load_config(path, overrides)
    stage_specs(config, vocabulary_size(config))  # a growth that cannot be is an error now and not after days
    check_layout(config, dist.get_world_size())
    check_apex(config)
    return config
