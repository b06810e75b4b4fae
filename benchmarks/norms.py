"""Times the norms against PyTorch, in turns in one process.

    python benchmarks/norms.py --markdown FILE

The peer of a norm is ``F.layer_norm`` or ``F.rms_norm``, also where ours weighs its statistics, which theirs do not do;
that of ``h = residual + dropout(x)`` and its norm is the same norm behind ``F.dropout`` and a sum, and, in lines
"separate", this project's own operations one after the other. Bytes are those that have to be moved at least, compared
with the rate of ``copy_`` measured in the same run; hidden states of 4096 rows and 768 columns fit in some machines'
caches. Times are medians; the ratio is the median over pairs measured close together; "others" is the share of the
cores that other processes took meanwhile. With ``--cpu-time`` the clock is that of the process's threads: for a busy
machine, on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from step import busy_seconds, environment, share_of_others, write_whole
from torch import Tensor

from elle_mp.ops.dropout import DropoutKey, dropout
from elle_mp.ops.library import instructions
from elle_mp.ops.norms import layer_norm, residual_rms_norm, rms_norm, weighted_layer_norm

EPS = 1e-5
DROPOUT = 0.1
Op = Callable[..., "tuple[Tensor, ...]"]


@dataclass(frozen=True)
class Case:
    """Two ways to compute something from x, residual, weight and bias."""

    name: str
    ours: Op
    theirs: Op
    tensors: int
    """Hidden states that forward and backward have to read and write, both together."""
    comparable: bool = True
    """Whether the two give the same numbers."""


class Inputs:
    """Hidden states and parameters of one type."""

    def __init__(self, options: argparse.Namespace, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(1)
        shape = (options.batch, options.length, options.columns)
        self.dtype = dtype
        self.x, self.residual, self.dy, self.dh = (torch.randn(shape, generator=generator).to(dtype) for _ in range(4))
        self.weight, self.bias = (torch.randn(options.columns, generator=generator).to(dtype) for _ in range(2))
        weights = torch.rand(options.columns, dtype=torch.float64, generator=generator) + 0.1
        self.stat_weights = weights / weights.sum()
        self.key = DropoutKey(3, torch.arange(options.batch))

    def run(self, op: Op, backward: bool) -> tuple[Tensor, ...]:
        """Results, or the gradients of all inputs that they depend on."""
        leaves = [x.detach().requires_grad_(backward) for x in (self.x, self.residual, self.weight, self.bias)]
        out = op(self, *leaves)
        if not backward:
            return out
        found = torch.autograd.grad(out, leaves, (self.dy, self.dh)[: len(out)], allow_unused=True)
        return tuple(x for x in found if x is not None)


def cases() -> list[Case]:
    """What is measured."""

    def weighted(i: Inputs, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return (layer_norm(x, weight, bias, EPS, i.stat_weights),)

    def plain(i: Inputs, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return (layer_norm(x, weight, bias, EPS),)

    def torch_norm(i: Inputs, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return (F.layer_norm(x, x.shape[-1:], weight, bias, EPS),)

    def rms(i: Inputs, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return (rms_norm(x, weight, EPS),)

    def torch_rms(i: Inputs, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return (F.rms_norm(x, x.shape[-1:], weight, EPS),)

    def fused(i: Inputs, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return weighted_layer_norm(x, residual, weight, bias, EPS, p=DROPOUT, key=i.key)

    def separate(i: Inputs, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        h = residual + dropout(x, DROPOUT, i.key)
        return layer_norm(h, weight, bias, EPS), h

    def torch_all(i: Inputs, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        h = residual + F.dropout(x, DROPOUT)
        return F.layer_norm(h, x.shape[-1:], weight, bias, EPS), h

    def sum_rms(i: Inputs, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return residual_rms_norm(x, residual, weight, EPS)

    def torch_sum_rms(i: Inputs, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        h = residual + x
        return F.rms_norm(h, x.shape[-1:], weight, EPS), h

    return [
        Case("weighted LayerNorm", weighted, torch_norm, 5, comparable=False),
        Case("LayerNorm", plain, torch_norm, 5),
        Case("RMSNorm", rms, torch_rms, 5),
        Case("dropout, sum, LayerNorm", fused, torch_all, 9, comparable=False),
        Case("dropout, sum, LayerNorm: separate", fused, separate, 9),
        Case("sum, RMSNorm", sum_rms, torch_sum_rms, 8),
    ]


def check(case: Case, inputs: Inputs) -> None:
    """Both sides compute the same gradient of x, where they should: PyTorch sums those of gains in bf16, badly."""
    ours, theirs = (inputs.run(op, True)[0].float() for op in (case.ours, case.theirs))
    far = (ours - theirs).abs().max() / theirs.abs().max()
    if case.comparable and far > (4e-2 if inputs.dtype == torch.bfloat16 else 1e-4):
        raise SystemExit(f"{case.name}: the two sides differ by {far:.2g}")


def pairs(case: Case, inputs: Inputs, repeats: int, clock: Callable[[], float]) -> tuple[list[float], list[float]]:
    """Seconds of forward and backward of both sides; which one goes first alternates."""
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for number in range(repeats + 2):
        for name in ("ours", "theirs") if number % 2 else ("theirs", "ours"):
            began = clock()
            inputs.run(getattr(case, name), True)
            taken = clock() - began
            if number > 1:  # the first pairs warm up
                seconds[name].append(taken)
    return seconds["ours"], seconds["theirs"]


def copy_rate(x: Tensor, repeats: int, clock: Callable[[], float]) -> float:
    """Bytes per second that ``copy_`` reads and writes."""
    to, best = torch.empty_like(x), float("inf")
    for _ in range(repeats + 1):
        began = clock()
        to.copy_(x)
        best = min(best, clock() - began)
    return 2 * x.nbytes / best


def row(case: Case, inputs: Inputs, repeats: int, copy: float, clock: Callable[[], float]) -> str:
    """One line of the table."""
    before = busy_seconds()
    ours, theirs = pairs(case, inputs, repeats, clock)
    others = share_of_others(before, busy_seconds())
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    rate = case.tensors * inputs.x.nbytes / statistics.median(ours)
    spread = statistics.quantiles(ratios, n=10)
    return (
        f"| {case.name} | {str(inputs.dtype).removeprefix('torch.')} | {statistics.median(ours) * 1e3:.2f} "
        f"| {statistics.median(theirs) * 1e3:.2f} | **{statistics.median(ratios):.2f}** "
        f"| {spread[0]:.2f} to {spread[-1]:.2f} | {rate / 1e9:.1f} | {rate / copy:.0%} | {others:.0%} |"
    )


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--columns", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=30, help="measured pairs")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's")
    parser.add_argument("--cpu-time", action="store_true", help="the threads' clock, for a busy machine")
    parser.add_argument("--markdown", type=Path)
    return parser.parse_args(argv)


def main() -> None:
    """Measures, prints, and writes what was asked for."""
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    where = environment(torch.device("cpu")) | {"instructions": instructions() or "not built: the references"}
    where["clock"] = "CPU time of the process" if options.cpu_time else "wall"
    lines = [
        "| case | type | ours ms | theirs ms | ratio | deciles | GB/s | of copy | others |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    print(where, *lines, sep="\n", flush=True)
    for name in options.dtype:
        inputs = Inputs(options, getattr(torch, name))
        copy = copy_rate(inputs.x, options.repeats, clock)
        where[f"copy {name}"] = f"{copy / 1e9:.1f} GB/s"
        for case in cases():
            check(case, inputs)
            lines.append(row(case, inputs, options.repeats, copy, clock))
            print(lines[-1], flush=True)
    if options.markdown:
        title = f"# Norms, forward and backward, B{options.batch} S{options.length} D{options.columns}"
        described = "\n".join(f"- {key}: {value}" for key, value in where.items())
        table = "\n".join(lines)
        write_whole(options.markdown, f"{title}\n\n{described}\n\n{table}\n")


if __name__ == "__main__":
    main()
