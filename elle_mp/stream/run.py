"""``elle-mp pretrain``: a whole stream, from the configuration to the table of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console

from elle_mp.config import Config
from elle_mp.config_file import check_layout, load_config
from elle_mp.growth.plan import make_plan
from elle_mp.models.build import Precision
from elle_mp.models.spec import ModelSpec
from elle_mp.observe.journal import Journal
from elle_mp.observe.tables import growth_table, make_console, stages_table
from elle_mp.parallel.agreement import on_first_rank
from elle_mp.parallel.mesh import start_distributed
from elle_mp.stream.domains import check_data, open_domains
from elle_mp.stream.run_directory import open_run_directory
from elle_mp.stream.runner import StreamRunner
from elle_mp.train.speed import gemm_rate

STOPPED = "stopped in stage {stage} ({domain}, {phase}) after step {step}; run the same command again to go on"


def pretrain(config_path: Path, overrides: Sequence[str] = ()) -> None:
    """Runs the stream of a configuration, or goes on with it where its run directory stands.

    Raises:
        UserError: anything in the configuration, the data or the run directory is wrong.
    """
    config = load_config(config_path, overrides)
    check_growth(config)
    device = start_distributed()
    console = make_console(dist.get_rank() == 0)
    try:
        check_layout(config, dist.get_world_size())
        on_first_rank(lambda: check_data(config))
        on_first_rank(lambda: open_run_directory(config))
        run_dir = Path(config.run.dir)
        peak = gemm_rate(device, Precision.named(config.precision).compute) * dist.get_world_size()
        domains = open_domains(config, run_dir, console.print)
        journal = Journal(run_dir, dist.get_rank() == 0, config.log.every, config.log.tensorboard, peak)
        runner = StreamRunner(config, domains, run_dir, device, journal)
        try:
            finished = runner.run()
        finally:
            journal.close()
        if finished:
            print_results(console, runner.results())
            console.print(f"results: {run_dir / 'results.json'}")
        else:
            state = runner.state
            domain = config.stream[state.stage].domain
            console.print(STOPPED.format(stage=state.stage, domain=domain, phase=state.phase, step=state.step))
    finally:
        dist.destroy_process_group()


def print_results(console: Console, results: Mapping[str, Any]) -> None:
    """The table of stages and, when there was one, that of growths."""
    console.print(stages_table(results))
    if any(stage["growth"] for stage in results["stages"]):
        console.print(growth_table(results))


def check_growth(config: Config) -> None:
    """Plans every growth of the stream, so that one that cannot be is an error now and not after days.

    Raises:
        UserError: a strategy cannot grow this family by these sizes.
    """
    spec = ModelSpec.from_config(config, config.tokenizer.vocab_size)
    for index in range(1, len(config.stream)):
        spec = make_plan(spec, config.stage_model(index), config.growth, config.run.seed).new
