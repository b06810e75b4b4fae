"""How long a checkpoint holds training up: saved at once and in the background, and as torch's own functions do it.

    python benchmarks/checkpoint.py [--megabytes 1000] [--rounds 5] [--out benchmarks/results/FILE.md]

A model's worth of fp32 weights and Adam's moments, sharded over one rank and over two, is saved to the disk (synced)
in each way in turn, several rounds in one run; medians, and the slowest rank. "Training" is a matrix product.

* ``save``: ``CheckpointStore.save``, hashes included, nothing else running. What the others are compared with.
* ``save_async``: the call, in which the trainer stands still: it copies the tensors to memory that is kept.
* ``behind it``: from the return to the complete checkpoint, while training goes on; and by how much the training
  steps of that time take longer than they do alone, all together: what the save takes of the cores.
* ``first call``: the same where ``prepare`` has not made the memory.
* ``torch save``, ``torch async_save``: ``torch.distributed.checkpoint``'s (no hashes, no rename), the call.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from elle_mp.checkpoint.store import CheckpointStore
from elle_mp.parallel.mesh import start_distributed

LAYERS = 12
SMALL = 6  # biases and gains of a layer


def state(megabytes: int) -> dict[str, Tensor]:
    """Weights and two moments of layers of four matrices and some vectors, rows sharded over the ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    width = 1024
    rows = megabytes * 1_000_000 // (3 * 4 * LAYERS * 4 * width) // dist.get_world_size()
    tensors: dict[str, Tensor] = {}

    def add(name: str, *local: int) -> None:
        for kind in ("model.{}", "optim.{}.exp_avg", "optim.{}.exp_avg_sq"):
            tensors[kind.format(name)] = DTensor.from_local(torch.rand(local), mesh, [Shard(0)], run_check=False)
        tensors[f"optim.{name}.step"] = torch.tensor(1.0)

    for layer in range(LAYERS):
        for number in range(4):
            add(f"layers.{layer}.weight{number}", rows, width)
        for number in range(SMALL):
            add(f"layers.{layer}.vector{number}", width // dist.get_world_size())
    return tensors


def seconds_of(work: Callable[[], object]) -> float:
    """Seconds of the slowest rank; all begin together."""
    dist.barrier()
    began = time.perf_counter()
    work()
    return slowest(time.perf_counter() - began)


def slowest(value: float) -> float:
    """The largest of the ranks' values."""
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return float(tensor)


class Training:
    """Steps that keep this rank's threads busy."""

    def __init__(self) -> None:
        self.values = torch.rand(1024, 1024)
        self.alone = 0.0

    def step(self) -> None:
        """About ten milliseconds."""
        torch.mm(self.values, self.values)

    def measure(self) -> None:
        """Seconds of a step alone; takes about one, in which the disk comes to rest as it does between saves."""
        times = []
        for _ in range(100):
            began = time.perf_counter()
            self.step()
            times.append(time.perf_counter() - began)
        self.alone = statistics.median(times)

    def until(self, done: Callable[[], bool]) -> tuple[float, float]:
        """Trains until then: seconds, and how many of them beyond what the steps take alone."""
        began, steps = time.perf_counter(), 0
        while not done():
            self.step()
            steps += 1
        taken = time.perf_counter() - began
        return taken, taken - steps * self.alone


def first_call(folder: Path, tensors: dict[str, Tensor]) -> float:
    """Of a store that has no memory yet; it is gone when this returns."""
    store = CheckpointStore(folder)
    seconds = seconds_of(lambda: store.save_async("fresh", tensors, {}))
    store.wait()
    return seconds


def one_round(folder: Path, store: CheckpointStore, tensors: dict[str, Tensor], train: Training) -> dict[str, float]:
    """Each way once."""
    dist.barrier()
    train.measure()
    figures = {"save": seconds_of(lambda: store.save("sync", tensors, {}))}
    train.measure()
    figures["save_async"] = seconds_of(lambda: store.save_async("async", tensors, {}))
    behind, delay = train.until(lambda: not store.saving)
    store.wait()
    figures["behind it"], figures["delay"] = slowest(behind), slowest(delay)
    figures["first call"] = first_call(store.folder, tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figures["torch save"] = seconds_of(lambda: dcp.save(tensors, checkpoint_id=folder / "torch"))
        futures = []
        figures["torch async_save"] = seconds_of(
            lambda: futures.append(dcp.async_save(tensors, checkpoint_id=folder / "torch"))
        )
        futures[0].result()
    return figures


def child(folder: Path, megabytes: int, rounds: int) -> None:
    """All rounds in this process; prints the figures."""
    start_distributed()
    torch.manual_seed(dist.get_rank())
    tensors, train = state(megabytes), Training()
    store = CheckpointStore(folder / "ours")
    store.prepare(tensors)
    store.wait()
    found = [one_round(folder, store, tensors, train) for _ in range(rounds + 1)][1:]
    size = sum(item.numel() * item.element_size() for item in tensors.values())
    if dist.get_rank() == 0:
        print("child:" + json.dumps({"bytes": size, "rounds": found}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def measure(ranks: int, megabytes: int, rounds: int) -> dict[str, float]:
    """Medians over the rounds, in processes of their own."""
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-"))
    arguments = ["--child", str(folder), "--megabytes", str(megabytes), "--rounds", str(rounds)]
    command = [sys.executable, __file__, *arguments]
    if ranks > 1:
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", "29517"]
        command = [sys.executable, *launch, __file__, *arguments]
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    try:
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": threads}
        )
    finally:
        shutil.rmtree(folder)
    line = next(line for line in done.stdout.splitlines() if line.startswith("child:"))
    found = json.loads(line.removeprefix("child:"))
    medians = {key: statistics.median(item[key] for item in found["rounds"]) for key in found["rounds"][0]}
    shares = [item["save_async"] / item["save"] for item in found["rounds"]]
    return medians | {"bytes": found["bytes"], "lowest": min(shares), "highest": max(shares)}


def report(results: dict[int, dict[str, float]], rounds: int) -> str:
    """Markdown."""
    lines = [
        "| ranks | GB | save | save_async | share | lowest to highest | behind it | steps longer by | first call "
        "| torch save | torch async_save |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for ranks, row in results.items():
        seconds = [f"{row[key]:.3f} s" for key in ("save", "save_async")]
        rest = [f"{row[key]:.2f} s" for key in ("behind it", "delay", "first call", "torch save", "torch async_save")]
        share = f"**{row['save_async'] / row['save']:.1%}** | {row['lowest']:.1%} to {row['highest']:.1%}"
        lines.append(f"| {ranks} | {row['bytes'] / 1e9:.2f} | {' | '.join([*seconds, share, *rest])} |")
    where = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {date.today()}"
    return f"{where}; medians of {rounds} rounds.\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    """Measures, prints, and writes what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.megabytes, options.rounds)
        return
    results = {ranks: measure(ranks, options.megabytes, options.rounds) for ranks in options.ranks}
    text = report(results, options.rounds)
    print(text)
    if options.out:
        options.out.write_text(f"# Saving checkpoints\n\n{text}")


if __name__ == "__main__":
    main()
