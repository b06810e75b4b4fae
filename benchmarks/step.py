"""Tokens per second of one training step: elle_mp against Hugging Face transformers, alternating in one run.

    python benchmarks/step.py [--family gpt bert] [--dropout 0 0.1] [--steps 7] [--json F] [--markdown F]

Both sides: the same batches, bf16 compute with fp32 masters, clipping at norm 1, fused AdamW, dropout in the
same three kinds of places (embeddings, sub-layer outputs, attention weights). Theirs: ``GPT2LMHeadModel`` and
``RobertaForMaskedLM`` with SDPA attention under bf16 autocast. Ours: the model, the optimizer and the step of
``elle-mp pretrain``, without a soft prompt. A pair of steps, one of each side, is measured close together, so
that what else runs on the machine slows both; the ratio is the median over the pairs; "others" is the share
of the cores that other processes took meanwhile. MFU: the training FLOPs of
our model (elle_mp.models.flops) over those of PyTorch's bf16 GEMM in the same time, measured in the same run.
Needs the ``transformers`` extra.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch import Tensor

import elle_mp
from elle_mp.config import Config
from elle_mp.data.batches import Batch
from elle_mp.models.build import Precision, empty_model
from elle_mp.models.flops import training_flops_per_token
from elle_mp.models.spec import ModelSpec
from elle_mp.models.transformer import IGNORED
from elle_mp.parallel.mesh import make_grid, start_distributed
from elle_mp.parallel.sharding import initialise
from elle_mp.train.optimizer import ShardedAdamW
from elle_mp.train.speed import gemm_rate
from elle_mp.train.trainer import Trainer

MASKED_SHARE = 0.15
MASK_ID = 4
LEARNING_RATE = 1e-4
WARM_STEPS = 2

Step = Callable[[Batch], float]


@dataclass(frozen=True)
class Sizes:
    """The shapes of both sides."""

    layers: int = 6
    heads: int = 6
    head_dim: int = 64
    length: int = 512
    batch: int = 8
    vocab: int = 8192

    @property
    def embed(self) -> int:
        """Width of the residual stream."""
        return self.heads * self.head_dim


@dataclass(frozen=True)
class Row:
    """One line of the table; rates in tokens per second, medians."""

    family: str
    dropout: float
    ours: float
    theirs: float
    ratio: float
    ratio_low: float
    ratio_high: float
    pairs: int
    others: float
    """Share of the cores that other processes took meanwhile: numbers with much of it mean little."""
    mfu: float
    """Ours."""
    our_loss: float
    their_loss: float


def make_batches(family: str, sizes: Sizes, count: int) -> list[Batch]:
    """Random tokens: the next one to predict (gpt), or 15 % of them masked (bert)."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for number in range(count):
        text = torch.randint(5, sizes.vocab, (sizes.batch, sizes.length + 1), generator=generator)
        tokens, targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()
        if family == "bert":
            chosen = torch.rand(tokens.shape, generator=generator) < MASKED_SHARE
            targets = torch.where(chosen, tokens, IGNORED)
            tokens = torch.where(chosen, MASK_ID, tokens)
        first = number * sizes.batch
        keys = torch.arange(first, first + sizes.batch)
        batches.append(Batch(tokens, targets, torch.zeros(sizes.batch, dtype=torch.int64), keys))
    return batches


def our_config(family: str, dropout: float, sizes: Sizes) -> Config:
    """Of a model of these shapes."""
    return Config.model_validate(
        {
            "model": {
                "family": family,
                "layers": sizes.layers,
                "heads": sizes.heads,
                "head_dim": sizes.head_dim,
                "seq_len": sizes.length,
                "dropout": dropout,
            },
            "prompts": {"tokens": 0},
            "optim": {"lr": LEARNING_RATE},
            "batch": {"global": sizes.batch, "micro": sizes.batch},
            "stream": [{"domain": "benchmark", "data": "none", "steps": 1}],
        }
    )


def our_step(config: Config, sizes: Sizes, device: torch.device) -> Step:
    """A step of ``elle-mp pretrain``."""
    grid = make_grid(config.parallel, device)
    precision = Precision.named("bf16")
    model = empty_model(ModelSpec.from_config(config, sizes.vocab), grid, precision)
    initialise(model, config.run.seed)
    model.train()
    trainer = Trainer(model, ShardedAdamW(model, config.optim), sizes.batch, config.run.seed)
    return lambda batch: trainer.step(batch, 1.0).loss


def their_model(family: str, dropout: float, sizes: Sizes) -> torch.nn.Module:
    """The class of transformers with the same shapes and dropout in the same places."""
    if family == "gpt":
        gpt = transformers.GPT2Config(
            vocab_size=sizes.vocab,
            n_positions=sizes.length,
            n_embd=sizes.embed,
            n_layer=sizes.layers,
            n_head=sizes.heads,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=1,
            eos_token_id=2,
            use_cache=False,
            attn_implementation="sdpa",
        )
        return transformers.GPT2LMHeadModel(gpt)
    bert = transformers.RobertaConfig(
        vocab_size=sizes.vocab,
        max_position_embeddings=sizes.length + 2,
        hidden_size=sizes.embed,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        intermediate_size=4 * sizes.embed,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        attn_implementation="sdpa",
    )
    return transformers.RobertaForMaskedLM(bert)


def their_step(family: str, dropout: float, sizes: Sizes, device: torch.device) -> Step:
    """An ordinary training step of transformers under bf16 autocast."""
    model = their_model(family, dropout, sizes).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def labels(batch: Batch) -> Tensor:
        # GPT-2's class shifts the labels itself.
        return batch.tokens if family == "gpt" else batch.targets

    def step(batch: Batch) -> float:
        batch = batch.to(device)
        with torch.autocast(device.type, torch.bfloat16):
            loss: Tensor = model(input_ids=batch.tokens, labels=labels(batch)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def timed(step: Step, batch: Batch) -> tuple[float, float]:
    """Seconds of one step, and its loss."""
    began = time.perf_counter()
    loss = step(batch)
    return time.perf_counter() - began, loss


def compare(family: str, dropout: float, steps: int, sizes: Sizes, gemm: float, device: torch.device) -> Row:
    """Alternates ``steps`` pairs of steps; which side goes first alternates too. ``gemm``: FLOPs per second."""
    config = our_config(family, dropout, sizes)
    batches = make_batches(family, sizes, WARM_STEPS + steps)
    torch.manual_seed(1)
    sides = {
        "ours": our_step(config, sizes, device),
        "theirs": their_step(family, dropout, sizes, device),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, float] = {}
    before = busy_seconds()
    for number, batch in enumerate(batches):
        if number == WARM_STEPS:
            before = busy_seconds()
        order = list(sides) if number % 2 == 0 else list(reversed(sides))
        for name in order:
            taken, losses[name] = timed(sides[name], batch)
            if number >= WARM_STEPS:
                seconds[name].append(taken)
    others = share_of_others(before, busy_seconds())
    ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["theirs"], strict=True)]
    tokens = sizes.batch * sizes.length
    flops = training_flops_per_token(ModelSpec.from_config(config, sizes.vocab)) * tokens
    return Row(
        family=family,
        dropout=dropout,
        ours=tokens / statistics.median(seconds["ours"]),
        theirs=tokens / statistics.median(seconds["theirs"]),
        ratio=statistics.median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
        pairs=len(ratios),
        others=others,
        mfu=flops / gemm / statistics.median(seconds["ours"]),
        our_loss=losses["ours"],
        their_loss=losses["theirs"],
    )


@dataclass(frozen=True)
class Busy:
    """Seconds since some moment: on the clock, of this process's threads, and of all cores' work."""

    clock: float
    mine: float
    everybody: float


def busy_seconds() -> Busy:
    """A reading of the three clocks (Linux; elsewhere nobody else seems to work)."""
    mine, stat = time.process_time(), Path("/proc/stat")
    if not stat.exists():
        return Busy(time.perf_counter(), mine, mine)
    user, nice, system, _, _, irq, softirq, steal = (int(x) for x in stat.read_text().split()[1:9])
    ticks = user + nice + system + irq + softirq + steal
    return Busy(time.perf_counter(), mine, ticks / os.sysconf("SC_CLK_TCK"))


def share_of_others(before: Busy, after: Busy) -> float:
    """What other processes took of the cores between two readings, 0 to 1."""
    cores = (after.clock - before.clock) * (os.cpu_count() or 1)
    return max(0.0, (after.everybody - before.everybody - after.mine + before.mine) / cores)


def environment(device: torch.device) -> dict[str, str | int]:
    """What the numbers depend on."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        flags = next((line for line in info.read_text().splitlines() if line.startswith("flags")), "").split()
        chosen = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
        processor = f"{names[0] if names else processor} ({', '.join(chosen)})"
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": processor,
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "elle_mp": elle_mp.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def table(rows: Sequence[Row]) -> str:
    """A Markdown table."""
    lines = [
        "| family | dropout | elle_mp tokens/s | transformers tokens/s | ratio | lowest to highest (pairs) "
        "| MFU | others |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.family} | {row.dropout:g} | {row.ours:,.0f} | {row.theirs:,.0f} | **{row.ratio:.2f}** "
        f"| {row.ratio_low:.2f} to {row.ratio_high:.2f} ({row.pairs}) | {row.mfu:.0%} | {row.others:.0%} |"
        for row in rows
    ]
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=("gpt", "bert"), default=["gpt", "bert"])
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.0, 0.1])
    parser.add_argument("--steps", type=int, default=7, help="measured pairs of steps")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's")
    for name, value in asdict(Sizes()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    return parser.parse_args()


def main() -> None:
    """Measures, prints, and writes what was asked for."""
    options = arguments()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    if options.threads:
        torch.set_num_threads(options.threads)
    sizes = Sizes(**{name: getattr(options, name) for name in asdict(Sizes())})
    device = start_distributed()
    where = environment(device)
    shapes = (
        f"L{sizes.layers} D{sizes.embed} H{sizes.heads} S{sizes.length} B{sizes.batch} V{sizes.vocab}, "
        f"bf16 with fp32 masters"
    )
    gemm = gemm_rate(device, torch.bfloat16)
    where["GEMM bfloat16"] = f"{gemm / 1e9:.0f} GFLOP/s"
    print(shapes, where, sep="\n", flush=True)
    rows = []
    try:
        for family in options.family:
            for dropout in options.dropout:
                rows.append(compare(family, dropout, options.steps, sizes, gemm, device))
                print(table(rows[-1:]).splitlines()[-1], flush=True)
    finally:
        dist.destroy_process_group()
    print(table(rows))
    if options.json:
        content = {"environment": where, "sizes": asdict(sizes), "rows": [asdict(row) for row in rows]}
        write_whole(options.json, json.dumps(content, indent=2) + "\n")
    if options.markdown:
        described = "\n".join(f"- {key}: {value}" for key, value in where.items())
        title = "# One training step against Hugging Face transformers"
        text = f"{title}\n\n{shapes}.\n\n{described}\n\n{table(rows)}\n"
        write_whole(options.markdown, text)


def write_whole(path: Path, text: str) -> None:
    """Writes the file beside and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text)
    beside.replace(path)


if __name__ == "__main__":
    main()
