"""Seconds and peak memory of growing a model with both moments, next to copying the same bytes.

    python benchmarks/growth.py [--sizes 30M 125M 350M] [--offline 30M 125M] [--out benchmarks/results/FILE.md]

Every row is a process of its own (two for two ranks), so that its peak memory is its own. All models are gpt, fp32
masters with Adam's two moments, grown to 1.5 times the width and 4/3 of the layers (1.3B: 1.25 times the width).

* ``copy_``: ``torch`` copies half of (old + new) bytes, which reads and writes as much as growth has to, into memory
  that is there already. Growth writes into memory that is there, too. Both on the same threads. The machine's memory
  runs at one of two speeds that change every few seconds, so growth and ``copy_`` take turns in one process: medians
  of both, and the median of the rounds' ratios; best of a few for the ways other than ours.
* ``live``: ``grow_on_shards`` on one rank and two (tp=2 and dp_shard=2), without and with noise (20 dB). ``weighted``
  copies and scales, as do ``replicate`` and ``iso``; ``lemon`` also takes means and draws what reads them.
* ``state dict``: what a user of Hugging Face does: index the whole state dict of one process with the same maps, make a
  second one, load it. Weights alone and, for like with like, weights and moments.
* ``ELLE``: after the description of the public code (reference/elle.md): the whole state dict, Python loops over added
  columns, a division of each. Weights alone; it has no moments.
* ``offline``: ``elle-mp grow``'s engine on a checkpoint, hashes included, next to reading the old file and writing a
  file of the new one's size, both to the disk (fsync).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from elle_mp.checkpoint.offline import OfflineGrowth, grow_checkpoint
from elle_mp.checkpoint.store import CheckpointStore
from elle_mp.checkpoint.stream_reader import StoredTensors
from elle_mp.config import GrowConfig, GrowthConfig, ModelConfig, OptimConfig, ParallelConfig, grown
from elle_mp.growth.apply import grow_on_shards
from elle_mp.growth.plan import GrowthPlan, make_plan
from elle_mp.growth.tensors import parameter_growths
from elle_mp.models.build import Precision, empty_model
from elle_mp.models.declarations import declarations
from elle_mp.models.spec import ModelSpec, sizes_of
from elle_mp.models.transformer import Transformer
from elle_mp.parallel.mesh import make_grid, start_distributed
from elle_mp.parallel.sharding import local_tensor
from elle_mp.stream.memory import LARGEST_BLOCK
from elle_mp.train.optimizer import ShardedAdamW

SIZES = {
    "30M": ((6, 8), (8, 12)),
    "125M": ((12, 12), (16, 18)),
    "350M": ((24, 16), (32, 24)),
    "1.3B": ((24, 32), (24, 40)),
}
"""Layers and heads of 64 channels (GPT-2's and GPT-3's sizes) before and after, with 32,000 ids."""
VOCAB, LENGTH = 32_000, 1024
ROUNDS = 3
TURNS = 15
"""Rounds of live growth and ``copy_``, one after the other."""
ALTERNATIONS = 2
FP32 = Precision(torch.float32, torch.float32)


def plan_of(size: str, noise_db: float | None, width: str = "weighted") -> GrowthPlan:
    """The growth that is measured."""
    (layers, heads), (new_layers, new_heads) = SIZES[size]
    model = ModelConfig(family="gpt", layers=layers, heads=heads, head_dim=64, seq_len=LENGTH)
    spec = ModelSpec(
        family="gpt",
        vocab_size=VOCAB,
        padded_vocab=VOCAB,
        domains=5,
        prompt_tokens=1,
        tied=True,
        dropout=0.0,
        attention_dropout=0.0,
        norm_eps=1e-5,
        rope_theta=1e4,
        lineage=tuple(range(layers)),
        **sizes_of(model),
    )
    larger = grown(model, GrowConfig(layers=new_layers, heads=new_heads))
    return make_plan(spec, larger, GrowthConfig(noise_db=noise_db, width=width), seed=1)


def entries(spec: ModelSpec) -> int:
    """Numbers in the weights of a model."""
    total = 0
    for item in declarations(spec).values():
        count = 1
        for size in item.shape(spec.axes):
            count *= size
        total += count
    return total


def best(work: Callable[[], None], rounds: int = ROUNDS) -> float:
    """Seconds of the fastest round, all ranks waiting for each other before each."""
    seconds = []
    for _ in range(rounds):
        if dist.get_world_size() > 1:
            dist.barrier()
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def copier(numbers: int) -> Callable[[], None]:
    """Lets ``copy_`` copy so many fp32 numbers, a gigabyte at a time, into memory that is there."""
    piece = min(numbers, 1 << 28)
    source, target = torch.ones(piece), torch.zeros(piece)
    whole, rest = divmod(numbers, piece)

    def copy() -> None:
        for _ in range(whole):
            target.copy_(source)
        target[:rest].copy_(source[:rest])

    return copy


def copy_seconds(numbers: int) -> float:
    """Seconds that ``copy_`` takes for so many fp32 numbers."""
    return best(copier(numbers))


def in_turns(first: Callable[[], None], second: Callable[[], None]) -> tuple[float, float, float]:
    """Median seconds of both, one after the other, and the median of the rounds' ratios; a first round not counted."""
    pairs = [(best(first, 1), best(second, 1)) for _ in range(TURNS + 1)][1:]
    return (
        median(pair[0] for pair in pairs),
        median(pair[1] for pair in pairs),
        median(pair[0] / pair[1] for pair in pairs),
    )


def peak() -> int:
    """Largest memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def filled(spec: ModelSpec, grid: Any) -> tuple[Transformer, ShardedAdamW]:
    """A model and its moments whose memory is there (every page written)."""
    model = empty_model(spec, grid, FP32)
    optimizer = ShardedAdamW(model, OptimConfig())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for tensor in (local_tensor(parameter), optimizer.moments[name].first, optimizer.moments[name].second):
                tensor.fill_(0.01)
    return model, optimizer


def live(size: str, noise_db: float | None, layout: dict[str, int], width: str) -> dict[str, float]:
    """Growth on the shards of this rank, and the copy of as many bytes."""
    grid = make_grid(ParallelConfig.model_validate(layout), start_distributed())
    plan = plan_of(size, noise_db, width)
    old, old_optimizer = filled(plan.old, grid)
    new, new_optimizer = filled(plan.new, grid)
    before = peak()
    received = 0

    def grow() -> None:
        nonlocal received
        received = grow_on_shards(plan, old, new, old_optimizer.moments, new_optimizer.moments).received

    grow()
    extra = peak() - before
    held = sum(local_tensor(item).numel() for model in (old, new) for item in model.parameters())
    seconds, copying, ratio = in_turns(grow, copier(held * 3 // 2))
    return {
        "seconds": seconds,
        "copy": copying,
        "ratio": ratio,
        "received": received,
        "extra": extra,
        "bytes": held * 12,
    }


def state_dict_way(size: str, with_moments: bool) -> dict[str, float]:
    """The same maps on the state dict of one process, tensor by tensor, and a second state dict."""
    start_distributed()
    plan = plan_of(size, None)
    growths = parameter_growths(plan, declarations(plan.new))
    kinds = range(3 if with_moments else 1)
    old = [
        {name: torch.full(item.shape(plan.old.axes), 0.01) for name, item in declarations(plan.old).items()}
        for _ in kinds
    ]
    new = [{name: torch.zeros(item.shape) for name, item in growths.items()} for _ in kinds]

    def grow() -> None:
        for degree, source, target in zip(kinds, old, new, strict=True):
            made = {}
            for name, growth in growths.items():
                if growth.source is None:
                    continue
                values = source[growth.source]
                for dim, item in enumerate(growth.dims):
                    if item is not None:
                        factor = (item.ratio**degree if degree else item.scale).float()
                        shape = [-1 if at == dim else 1 for at in range(values.dim())]
                        values = values.index_select(dim, item.item.index) * factor.view(shape)
                made[name] = torch.zeros_like(values) if growth.treatment.zero else values
            for name, values in made.items():  # load_state_dict
                target[name].copy_(values)

    seconds = best(grow)
    numbers = (entries(plan.old) + entries(plan.new)) * len(kinds) // 2
    return {"seconds": seconds, "copy": copy_seconds(numbers), "peak": peak()}


def elle_way(size: str) -> dict[str, float]:
    """Random maps, column by column in Python, on the whole state dict of one process; weights alone."""
    start_distributed()
    plan = plan_of(size, None)
    growths = parameter_growths(plan, declarations(plan.new))
    old = {name: torch.full(item.shape(plan.old.axes), 0.01) for name, item in declarations(plan.old).items()}
    drawn = torch.Generator().manual_seed(1)

    def widened(values: torch.Tensor, dim: int, size: int, divide: bool) -> torch.Tensor:
        have = values.shape[dim]
        chosen = torch.randint(have, (size - have,), generator=drawn).tolist()
        counts = [1] * have
        for unit in chosen:
            counts[unit] += 1
        parts = [values]
        for unit in chosen:
            parts.append(values.narrow(dim, unit, 1).clone())
        out = torch.cat(parts, dim)
        if divide:
            for place, unit in enumerate([*range(have), *chosen]):
                out.narrow(dim, place, 1).div_(counts[unit])
        return out

    def grow() -> None:
        made = {}
        for name, growth in growths.items():
            if growth.source is None:
                continue
            values = old[growth.source].clone()
            for dim, item in enumerate(growth.dims):
                if item is not None:
                    values = widened(values, dim, growth.shape[dim], growth.spec.dims[dim].role.value == "read")
            made[name] = values
        target = {name: torch.empty(item.shape) for name, item in growths.items()}
        for name, values in made.items():
            target[name].copy_(values)

    seconds = best(grow, 1)
    return {"seconds": seconds, "copy": copy_seconds((entries(plan.old) + entries(plan.new)) // 2), "peak": peak()}


def offline_store(size: str, folder: Path) -> None:
    """Writes the old checkpoint, block by block."""
    start_distributed()
    plan = plan_of(size, None)
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, item in declarations(plan.old).items():
        shape = item.shape(plan.old.axes)
        tensors[f"model.{name}"] = (shape, torch.float32)
        tensors[f"optim.{name}.step"] = ((), torch.float32)
        tensors[f"optim.{name}.exp_avg"] = tensors[f"optim.{name}.exp_avg_sq"] = (shape, torch.float32)

    def produce(name: str, bounds: Any) -> torch.Tensor:
        return torch.full([stop - start for start, stop in bounds], 0.01)

    CheckpointStore(folder).save_streamed("old", tensors, produce, {})


def offline(size: str, folder: Path, noise_db: float | None) -> dict[str, float]:
    """The engine of ``elle-mp grow`` from one file to another."""
    start_distributed()
    plan = plan_of(size, noise_db)
    began = time.perf_counter()
    growth = OfflineGrowth(plan, StoredTensors(folder / "old"), declarations(plan.new))
    grow_checkpoint(growth, CheckpointStore(folder.parent / "grown"), "new", {}, LARGEST_BLOCK, lambda count: None)
    seconds = time.perf_counter() - began
    shutil.rmtree(folder.parent / "grown")
    return {"seconds": seconds, "peak": peak()}


def plain_files(size: str, folder: Path) -> dict[str, float]:
    """Reads the old checkpoint's files and writes as many bytes as the new one has, to the disk."""
    start_distributed()
    plan = plan_of(size, None)
    left, piece = entries(plan.new) * 12, bytearray(64 << 20)
    began = time.perf_counter()
    for path in sorted((folder / "old").rglob("*")):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(piece):
                pass
    with open(folder.parent / "plain", "wb", buffering=0) as file:
        while left > 0:
            left -= file.write(memoryview(piece)[: min(left, len(piece))])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    (folder.parent / "plain").unlink()
    return {"seconds": seconds, "bytes": (entries(plan.old) + entries(plan.new)) * 12}


def child(arguments: dict[str, Any], ranks: int = 1) -> dict[str, float]:
    """Runs one measurement in processes of its own; the slowest rank's seconds."""
    command = [sys.executable, __file__, "--child", json.dumps(arguments)]
    if ranks > 1:
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(ranks),
            "--master-port",
            "29511",
        ]
        command = [*launch, *command[1:]]
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if ranks > 1 else {})
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    # Two ranks may write on one line.
    lines = [json.JSONDecoder().raw_decode(part)[0] for part in done.stdout.split("child:")[1:]]
    return {key: max(line[key] for line in lines) for key in lines[0]}


def run_child(arguments: dict[str, Any]) -> None:
    """Does what :func:`child` asked for and prints the figures."""
    kind = arguments.pop("kind")
    if "folder" in arguments:
        arguments["folder"] = Path(arguments["folder"])
    works: dict[str, Callable[..., Any]] = {
        "live": live,
        "state dict": state_dict_way,
        "elle": elle_way,
        "store": offline_store,
        "offline": offline,
        "plain": plain_files,
    }
    result = works[kind](**arguments)
    print("child:" + json.dumps(result or {}), flush=True)
    if dist.get_world_size() > 1:
        dist.barrier()
    dist.destroy_process_group()


def live_rows(size: str) -> list[str]:
    """The table's rows of one size."""
    rows = []
    places: list[tuple[dict[str, int], int]] = [({}, 1), ({"tp": 2}, 2), ({"dp_shard": 2}, 2)]
    cases = [("weighted", layout, ranks) for layout, ranks in places] + [("lemon", {}, 1)]
    for width, layout, ranks in cases:
        for noise in (None, 20.0):
            got = child({"kind": "live", "size": size, "noise_db": noise, "layout": layout, "width": width}, ranks)
            place = " ".join(f"{axis}={count}" for axis, count in layout.items()) or "one rank"
            rows.append(
                f"| {size} | live, {width}, {place}{', noise' if noise else ''} | {got['bytes'] / 1e9:.2f} | "
                f"{got['seconds']:.3f} | {got['copy']:.3f} | **{got['ratio']:.2f}** | "
                f"{got['extra'] / 1e6:.0f} MB over old + new; {got['received'] / 1e6:.0f} MB received |"
            )
            print(rows[-1], flush=True)
    for kind, label, arguments in (
        ("state dict", "state dict, weights and moments", {"with_moments": True}),
        ("state dict", "state dict, weights alone", {"with_moments": False}),
        ("elle", "ELLE's way, weights alone", {}),
    ):
        got = child({"kind": kind, "size": size, **arguments})
        rows.append(
            f"| {size} | {label} | | {got['seconds']:.3f} | {got['copy']:.3f} | "
            f"{got['seconds'] / got['copy']:.2f} | {got['peak'] / 1e9:.2f} GB in all |"
        )
        print(rows[-1], flush=True)
    return rows


def offline_rows(size: str, scratch: Path) -> list[str]:
    """Offline growth of one size, alternating with plain reading and writing."""
    rows = []
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name) / "run"
        child({"kind": "store", "size": size, "folder": str(folder)})
        large = size == "1.3B"
        for noise in (20.0,) if large else (None, 20.0):
            plain, ours = [], []
            for _ in range(1 if large else ALTERNATIONS):
                plain.append(child({"kind": "plain", "size": size, "folder": str(folder)}))
                ours.append(child({"kind": "offline", "size": size, "folder": str(folder), "noise_db": noise}))
            reading, growing = (min(item["seconds"] for item in items) for items in (plain, ours))
            memory = max(item["peak"] for item in ours) / 1e9
            rows.append(
                f"| {size} | offline{', noise' if noise else ''} | {plain[0]['bytes'] / 1e9:.2f} | {growing:.2f} | "
                f"{reading:.2f} | **{growing / reading:.2f}** | {memory:.2f} GB in all |"
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measures, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=["30M", "125M"])
    parser.add_argument("--offline", nargs="*", choices=SIZES, default=["30M", "125M"])
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_child(json.loads(options.child))
        return
    head = [
        "| model | how | GB read and written | seconds | copy_, or read + write | ratio | memory, traffic |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(head), flush=True)
    rows = [row for size in options.sizes for row in live_rows(size)]
    rows += [row for size in options.offline for row in offline_rows(size, options.scratch)]
    if options.out:
        processor = f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"
        command = f"python benchmarks/growth.py --sizes {' '.join(options.sizes)} --offline {' '.join(options.offline)}"
        machine = f"{date.today()}, {processor}, {os.cpu_count()} cores, torch {torch.__version__}"
        notes = (__doc__ or "").split("\n\n", 2)[2]
        options.out.write_text(
            f"# Growth at the speed of memory\n\n`{command}` ({machine})\n\n" + "\n".join(head + rows) + f"\n\n{notes}"
        )


if __name__ == "__main__":
    main()
