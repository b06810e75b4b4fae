"""Attention, forward and backward: ``expanded_attention`` against PyTorch's SDPA, alternating in one run.

    python benchmarks/attention.py [--length 512 2048] [--dtype bfloat16 float32] [--repeats 7] [--markdown F]

Dense causal sequences, and packed documents (mean length 128, a prompt of 16 tokens) for which SDPA gets the mask.
Operations are those of the keys that are seen: 4 D for each (query, key), 2.5 times as many backward; they are
compared with the rate of PyTorch's GEMM of side 2048, measured in the same run. Times are medians; the ratio is the
median over pairs measured close together; "others" is the share of the cores that other processes took meanwhile.
With ``--cpu-time`` the clock is that of the process's threads: for a busy machine, on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from step import busy_seconds, environment, share_of_others, write_whole
from torch import Tensor

from elle_mp.ops.expanded_attention import expanded_attention, expanded_attention_reference
from elle_mp.ops.library import instructions

MEAN_DOCUMENT = 128
PROMPT = 16
BACKWARD = 2.5
GEMM_SIDE = 2048


class Case:
    """Inputs of both sides."""

    def __init__(self, options: argparse.Namespace, length: int, dtype: torch.dtype, packed: bool) -> None:
        generator = torch.Generator().manual_seed(1)
        shape = (options.batch, length, options.heads, options.head_dim)
        self.name = f"{'packed' if packed else 'causal'} S{length} {str(dtype).removeprefix('torch.')}"
        self.q, self.k, self.v, self.grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(4))
        self.starts: Tensor | None = None
        self.mask: Tensor | None = None
        place = torch.arange(length)
        seen = (place <= place[:, None]).expand(options.batch, -1, -1)
        if packed:
            starts = torch.rand(options.batch, length, generator=generator) < 1 / MEAN_DOCUMENT
            starts[:, :PROMPT], starts[:, PROMPT] = False, True
            self.starts = torch.where(starts, place, 0).cummax(1).values
            seen = seen & ((self.starts[:, None] == self.starts[:, :, None]) | (place < PROMPT))
            self.mask = seen[:, None]
        self.operations = 4.0 * options.head_dim * options.heads * int(seen.sum())

    def ours(self, backward: bool) -> tuple[Tensor, ...]:
        """The op, on tensors as a model has them."""
        inputs = [x.detach().requires_grad_(backward) for x in (self.q, self.k, self.v)]
        out, _ = expanded_attention(*inputs, causal=True, doc_starts=self.starts, prompt_length=PROMPT)
        return torch.autograd.grad(out, inputs, self.grad) if backward else (out,)

    def theirs(self, backward: bool) -> tuple[Tensor, ...]:
        """SDPA on the same tensors, laid out as it likes them."""
        inputs = [x.transpose(1, 2).contiguous().requires_grad_(backward) for x in (self.q, self.k, self.v)]
        out = F.scaled_dot_product_attention(*inputs, attn_mask=self.mask, is_causal=self.mask is None)
        if not backward:
            return (out.transpose(1, 2),)
        return tuple(x.transpose(1, 2) for x in torch.autograd.grad(out, inputs, self.grad.transpose(1, 2)))


def check(case: Case) -> None:
    """Both sides compute the same thing, and what the reference does for one sequence."""
    tolerance = 2e-2 if case.q.dtype == torch.bfloat16 else 1e-4
    for ours, theirs in zip(case.ours(True), case.theirs(True), strict=True):
        far = (ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()
        if far > tolerance:
            raise SystemExit(f"{case.name}: the two sides differ by {far:.2g}")
    some = [x[:1, :, :1].double() for x in (case.q, case.k, case.v)]
    starts = None if case.starts is None else case.starts[:1]
    exact, _ = expanded_attention_reference(*some, causal=True, doc_starts=starts, prompt_length=PROMPT)
    far = (case.ours(False)[0][:1, :, :1].double() - exact).abs().max() / exact.abs().max()
    if far > tolerance:
        raise SystemExit(f"{case.name}: the op differs from its reference by {far:.2g}")


def pairs(case: Case, backward: bool, repeats: int, clock: Callable[[], float]) -> tuple[list[float], list[float]]:
    """Seconds of both sides; which one goes first alternates."""
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for number in range(repeats + 1):
        for name in ("ours", "theirs") if number % 2 else ("theirs", "ours"):
            run = getattr(case, name)
            began = clock()
            run(backward)
            taken = clock() - began
            if number:  # the first pair warms up
                seconds[name].append(taken)
    return seconds["ours"], seconds["theirs"]


def gemm_rate(dtype: torch.dtype, repeats: int, clock: Callable[[], float]) -> float:
    """Operations per second of PyTorch's square product by the clock that the op is measured by."""
    a, b = (torch.randn(GEMM_SIDE, GEMM_SIDE).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats + 1):
        began = clock()
        torch.mm(a, b)
        best = min(best, clock() - began)
    return 2.0 * GEMM_SIDE**3 / best


def row(case: Case, backward: bool, repeats: int, gemm: float, clock: Callable[[], float]) -> str:
    """One line of the table."""
    before = busy_seconds()
    ours, theirs = pairs(case, backward, repeats, clock)
    others = share_of_others(before, busy_seconds())
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    rate = case.operations * (1 + BACKWARD if backward else 1) / statistics.median(ours)
    what = "forward + backward" if backward else "forward"
    return (
        f"| {case.name} | {what} | {statistics.median(ours) * 1e3:.1f} | {statistics.median(theirs) * 1e3:.1f} "
        f"| **{statistics.median(ratios):.1f}** | {min(ratios):.1f} to {max(ratios):.1f} | {rate / 1e9:.0f} "
        f"| {rate / gemm:.0%} | {others:.0%} |"
    )


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--dtype", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7, help="measured pairs")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's")
    parser.add_argument("--cpu-time", action="store_true", help="the threads' clock, for a busy machine")
    parser.add_argument("--markdown", type=Path)
    return parser.parse_args()


def main() -> None:
    """Measures, prints, and writes what was asked for."""
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    where = environment(torch.device("cpu")) | {"instructions": instructions() or "not built: the reference"}
    where["clock"] = "CPU time of the process" if options.cpu_time else "wall"
    lines = [
        "| case | what | op ms | SDPA ms | ratio | lowest to highest | GFLOP/s | of GEMM | others |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    print(where, *lines, sep="\n", flush=True)
    for name in options.dtype:
        dtype = getattr(torch, name)
        gemm = gemm_rate(dtype, options.repeats, clock)
        where[f"GEMM {name}"] = f"{gemm / 1e9:.0f} GFLOP/s"
        for length in options.length:
            for packed in (False, True):
                case = Case(options, length, dtype, packed)
                check(case)
                for backward in (False, True):
                    lines.append(row(case, backward, options.repeats, gemm, clock))
                    print(lines[-1], flush=True)
    print(where)
    if options.markdown:
        title = f"# Attention against SDPA, B{options.batch} H{options.heads} D{options.head_dim}"
        described = "\n".join(f"- {key}: {value}" for key, value in where.items())
        table = "\n".join(lines)
        write_whole(options.markdown, f"{title}\n\n{described}\n\n{table}\n")


if __name__ == "__main__":
    main()
