"""The last projection with its loss: ``linear_cross_entropy`` against ``F.cross_entropy(x @ W.T)``, in turns.

    python benchmarks/cross_entropy.py [--rows 2048 8192] [--dtype bfloat16 float32] [--repeats 5] [--markdown FILE]

Loss, and gradients of the hidden states and of the table. Memory is what a process of its own takes for one call over
what it had with the inputs (its peak resident set). "GEMM" is the time of the three products that both sides need, by
PyTorch in the same run, over ours. Times are medians; the ratio is the median over pairs measured close together.
"""

from __future__ import annotations

import argparse
import multiprocessing
import multiprocessing.connection
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from attention import pairs
from step import busy_seconds, environment, share_of_others, write_whole
from torch import Tensor

from elle_mp.ops.library import instructions
from elle_mp.ops.linear_cross_entropy import linear_cross_entropy


class Case:
    """Inputs of both sides."""

    def __init__(self, rows: int, size: int, vocab: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(1)
        self.name = f"N{rows} V{vocab} D{size} {str(dtype).removeprefix('torch.')}"
        self.hidden = torch.randn(rows, size, generator=generator).to(dtype)
        self.table = (torch.randn(vocab, size, generator=generator) * size**-0.5).to(dtype)
        self.targets = torch.randint(0, vocab, (rows,), generator=generator)

    def ours(self, backward: bool) -> tuple[Tensor, ...]:
        """The op."""
        leaves = [x.detach().requires_grad_(backward) for x in (self.hidden, self.table)]
        loss = linear_cross_entropy(leaves[0], leaves[1], self.targets)
        return (loss, *torch.autograd.grad(loss, leaves)) if backward else (loss,)

    def theirs(self, backward: bool) -> tuple[Tensor, ...]:
        """PyTorch's two ops."""
        leaves = [x.detach().requires_grad_(backward) for x in (self.hidden, self.table)]
        loss = F.cross_entropy(leaves[0] @ leaves[1].t(), self.targets, reduction="sum")
        return (loss, *torch.autograd.grad(loss, leaves)) if backward else (loss,)

    def products(self) -> float:
        """Seconds of the matrix products of both directions, in blocks that stay in the cache."""
        gradient = torch.randn(self.hidden.shape[0], 4096).to(self.hidden.dtype)
        block = self.table[:4096]
        logits, hidden, table = torch.empty_like(gradient), torch.empty_like(self.hidden), torch.empty_like(block)
        best = float("inf")
        for _ in range(4):
            began = time.perf_counter()
            torch.mm(self.hidden, block.t(), out=logits)
            torch.mm(gradient, block, out=hidden)
            torch.mm(gradient.t(), self.hidden, out=table)
            best = min(best, time.perf_counter() - began)
        return best * self.table.shape[0] / 4096


def check(case: Case) -> None:
    """Both sides compute the same thing."""
    tolerance = 2e-2 if case.hidden.dtype == torch.bfloat16 else 1e-4
    for ours, theirs in zip(case.ours(True), case.theirs(True), strict=True):
        far = (ours.float() - theirs.float()).norm() / theirs.float().norm()
        if far > tolerance:
            raise SystemExit(f"{case.name}: the two sides differ by {far:.2g}")


def memory(case: Case, side: str) -> int:
    """Bytes that a call takes besides its inputs, results among them."""
    ours, theirs = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=report_peak, args=(case, side, theirs))
    process.start()
    theirs.close()
    taken: int = ours.recv()
    process.join()
    return taken


def report_peak(case: Case, side: str, pipe: multiprocessing.connection.Connection) -> None:
    """The peak resident set of one call, from a reset on, less what there was."""
    torch.set_num_threads(1)  # threads do not survive a fork
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    getattr(case, side)(True)
    pipe.send(status("VmHWM") - before)


def status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def row(case: Case, repeats: int) -> str:
    """One line of the table."""
    before = busy_seconds()
    ours, theirs = pairs(case, True, repeats, time.perf_counter)
    others = share_of_others(before, busy_seconds())
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    mine, other = memory(case, "ours"), memory(case, "theirs")
    return (
        f"| {case.name} | {statistics.median(ours) * 1e3:.0f} | {statistics.median(theirs) * 1e3:.0f} "
        f"| **{statistics.median(ratios):.2f}** | {min(ratios):.2f} to {max(ratios):.2f} "
        f"| {case.products() / statistics.median(ours):.0%} | {mine >> 20} | {other >> 20} | **{mine / other:.2f}** "
        f"| {others:.0%} |"
    )


def main() -> None:
    """Measures, prints, and writes what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--size", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = str(environment(torch.device("cpu")) | {"instructions": instructions() or "not built: PyTorch"})
    lines = [
        "| case | op ms | F.cross_entropy ms | ratio | lowest to highest | GEMM | op MiB | F.cross_entropy MiB "
        "| ratio | others |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    print(where, *lines, sep="\n", flush=True)
    for dtype in options.dtype:
        for rows in options.rows:
            case = Case(rows, options.size, options.vocab, getattr(torch, dtype))
            check(case)
            lines.append(row(case, options.repeats))
            print(lines[-1], flush=True)
    if options.markdown is not None:
        write_whole(options.markdown, "\n".join(["# Projection and cross entropy", "", where, "", *lines, ""]))


if __name__ == "__main__":
    main()
