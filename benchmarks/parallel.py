"""Tokens per second and memory of layouts over two ranks, against one process with the same cores.

    python benchmarks/parallel.py [--layouts tp2 pp2 dp2 ...] [--steps 6] [--out benchmarks/results/FILE.md]

One gpt of L6 D384, 512 positions, bf16 compute with fp32 masters, the same global batch for all. One process has two
threads, each of two ranks has one. Every row is a fresh job (``torchrun``'s environment, gloo over loopback); one
process is measured before and after each layout, and the ratio is to the mean of both, so that a machine that is
slow for a while slows both sides. Memory is a rank's peak over what importing takes. Bytes on the wire are those that
the loopback device counted during the measured steps, of both ranks, headers included: nothing else may use it.
Next to memory and bytes stands what ``elle-mp pretrain --dry-run`` says of the same layout.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import socket
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from elle_mp.config import Config
from elle_mp.data.batches import Batch
from elle_mp.models.build import Precision
from elle_mp.models.spec import ModelSpec
from elle_mp.observe.planning.plan import plan_stage
from elle_mp.observe.planning.setting import stage_setting
from elle_mp.parallel.mesh import make_grid, start_distributed
from elle_mp.train.engine import make_optimizer
from elle_mp.train.trainer import Trainer, rows_of

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2 (replicas)": {"dp_replicate": 2},
    "dp2 (shards)": {"dp_shard": 2},
    "tp2": {"tp": 2},
    "tp2, sequence parallel": {"tp": 2, "sequence_parallel": True},
    "pp2, 1f1b": {"pp": 2},
    "pp2, interleaved_1f1b": {"pp": 2, "schedule": "interleaved_1f1b"},
    "pp2, zbv": {"pp": 2, "schedule": "zbv"},
    "cp2": {"cp": 2},
    "DeepSpeed, ZeRO 3": {"dp_shard": 2, "engine": "deepspeed", "zero_stage": 3},
}
VOCAB = 8192
WARM_STEPS = 2
ONE = "one process"


def config_of(layout: dict[str, Any]) -> Config:
    """The model and the batch of every row."""
    return Config.model_validate(
        {
            "model": {"family": "gpt", "layers": 6, "heads": 6, "head_dim": 64, "seq_len": 512},
            "prompts": {"tokens": 0},
            "batch": {"global": 16, "micro": 2},
            "parallel": layout,
            "stream": [{"domain": "benchmark", "data": "none", "steps": 1}],
        }
    )


def batch_of(step: int, rows: int, length: int) -> Batch:
    """Random tokens and the next ones."""
    text = torch.randint(5, VOCAB, (rows, length + 1), generator=torch.Generator().manual_seed(step))
    serial = torch.arange(rows) + rows * step
    return Batch(text[:, :-1].contiguous(), text[:, 1:].contiguous(), torch.zeros(rows, dtype=torch.int64), serial)


def job(layout: dict[str, Any], steps: int) -> dict[str, Any]:
    """One rank's measure: median seconds of a step, peak memory, the last loss."""
    device = start_distributed()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = config_of(layout)
    grid = make_grid(config.parallel, device)
    optimizer = make_optimizer(ModelSpec.from_config(config, VOCAB), grid, Precision.named("bf16"), config.optim)
    optimizer.initialise(1)
    trainer = Trainer(optimizer.model.train(), optimizer, config.batch.micro, 1)
    first, last = rows_of(grid, config.batch.global_)
    seconds, loss, sent = [], 0.0, 0
    for step in range(WARM_STEPS + steps):
        batch = batch_of(step, config.batch.global_, 512).rows(first, last)
        dist.barrier()
        sent = bytes_on_loopback() if step == WARM_STEPS else sent
        began = time.perf_counter()
        loss = trainer.step(batch, 1.0).loss
        seconds.append(time.perf_counter() - began)
    dist.barrier()
    wire = (bytes_on_loopback() - sent) / steps
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    dist.destroy_process_group()
    median = statistics.median(seconds[WARM_STEPS:])
    return {"seconds": median, "memory": (peak - before) * 1024, "loss": loss, "wire": wire}


def bytes_on_loopback() -> int:
    """Bytes that the loopback device has sent since the machine started."""
    return int(Path("/sys/class/net/lo/statistics/tx_bytes").read_text())


def plan_of(layout: dict[str, Any]) -> tuple[float, float]:
    """What the planner says: the heaviest rank's bytes of memory, and those that all ranks send in a step."""
    config = config_of(layout)
    world = 1 if layout == {} else 2
    setting = stage_setting(config, 0, ModelSpec.from_config(config, VOCAB), world, "cpu")
    plan = plan_stage(ONE, setting)
    return plan.heaviest.memory.total, sum(rank.traffic.total for rank in plan.ranks) * world / len(plan.ranks)


def run(layout: dict[str, Any], ranks: int, steps: int) -> list[dict[str, Any]]:
    """:func:`job` on ``ranks`` processes that share two threads."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    work = []
    for rank in range(ranks):
        environment = os.environ | {
            "OMP_NUM_THREADS": str(2 // ranks),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        call = [sys.executable, __file__, "--job", json.dumps({"layout": layout, "steps": steps})]
        work.append(subprocess.Popen(call, env=environment, stdout=subprocess.PIPE, text=True))
    results = []
    for process in work:
        output, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"a rank of {layout} ended with exit code {process.returncode}")
        results.append(json.loads(output.splitlines()[-1]))
    return results


def row(name: str, steps: int) -> str:
    """One line of the table: the layout between two measures of one process."""
    before = run({}, 1, steps)[0]
    ranks = run(LAYOUTS[name], 2, steps)
    after = run({}, 1, steps)[0]
    tokens = config_of({}).batch.global_ * 512
    alone = tokens * 2 / (before["seconds"] + after["seconds"])
    rate = tokens / max(item["seconds"] for item in ranks)
    memory, one = (max(item["memory"] for item in items) / 1e6 for items in (ranks, [before, after]))
    (planned, sent), (planned_one, _) = plan_of(LAYOUTS[name]), plan_of({})
    cells = [name, f"{rate:.0f}", f"{alone:.0f}", f"**{rate / alone:.2f}**"]
    cells += [f"{memory:.0f} ({planned / 1e6:.0f})", f"{one:.0f} ({planned_one / 1e6:.0f})"]
    cells += [f"{ranks[0]['wire'] / 1e6:.1f} ({sent / 1e6:.1f})", f"{abs(ranks[0]['loss'] - before['loss']):.1e}"]
    line = f"| {' | '.join(cells)} |"
    print(line, flush=True)
    return line


def main() -> None:
    """Measures what was asked for, a row at a time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layouts", nargs="*", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(job(**json.loads(options.job))))
        return
    head = [
        "| layout | tokens/s | one process | ratio | MB a rank (plan) | MB one process (plan) "
        "| MB on the wire a step (plan) | difference in loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(head))
    lines = head + [row(name, options.steps) for name in options.layouts]
    if options.out:
        machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
        title = f"# Layouts on two cores\n\n`python benchmarks/parallel.py` ({date.today()}, {machine})\n\n"
        options.out.write_text(title + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
