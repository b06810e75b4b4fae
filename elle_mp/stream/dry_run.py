"""``elle-mp pretrain --dry-run``: the whole stream on paper, for any number of ranks."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from elle_mp.config import Config, ParallelConfig
from elle_mp.config_file import load_config
from elle_mp.config_layout import layout_problems
from elle_mp.data.files import write_whole
from elle_mp.errors import UserError
from elle_mp.growth.stages import stage_specs
from elle_mp.observe.planning.plan import plan_stream
from elle_mp.observe.planning.table import stream_tables
from elle_mp.observe.tables import make_console
from elle_mp.stream.domains import vocabulary_size


def dry_run(config_path: Path, overrides: Sequence[str] = (), json_path: Path | None = None) -> list[str]:
    """Prints what every stage of a stream would hold, send and compute on each rank; starts nothing.

    Args:
        json_path: also write the numbers here.

    Returns:
        What does not divide, a line each; nothing is printed then.

    Raises:
        UserError: the configuration is wrong, or the numbers cannot be written.
    """
    config = load_config(config_path, overrides)
    specs = stage_specs(config, vocabulary_size(config))
    world_size = planned_world_size(config)
    found = list(layout_problems(config, world_size))
    if found:
        return found
    device = "cuda" if torch.cuda.is_available() or world_size > 1 else "cpu"
    stages = plan_stream(config, specs, world_size, device)
    console = make_console()
    console.print(stream_tables(stages, world_size))
    layouts = [config.stage_parallel(index) for index in range(len(config.stream))]
    if any(layout.split == "measured" and layout.pp > 1 for layout in layouts):
        console.print("parallel.split=measured: nothing is measured on paper; layers are split here as estimated")
    if json_path is not None:
        numbers = {"world_size": world_size, "stages": [stage.to_json() for stage in stages]}
        try:
            write_whole(json_path, (json.dumps(numbers, indent=2) + "\n").encode())
        except UserError as error:
            raise UserError(f"--json: {error}") from None
    return []


def planned_world_size(config: Config) -> int:
    """``parallel.world_size``, or the ranks that run, or as many as the largest stage wants."""
    if config.parallel.world_size is not None:
        return config.parallel.world_size
    running = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")))
    if running > 1:
        return running
    return max(_ranks(config.stage_parallel(index)) for index in range(len(config.stream)))


def _ranks(layout: ParallelConfig) -> int:
    replicas = 1 if layout.dp_replicate == "auto" else layout.dp_replicate
    return layout.pp * replicas * layout.dp_shard * layout.cp * layout.tp
