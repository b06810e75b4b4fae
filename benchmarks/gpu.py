"""The CUDA kernels against their peers on one GPU, and against the machine's own ceilings.

    python benchmarks/gpu.py [--only attention expand ...] [--quick] [--device cpu] [--markdown F]

Ceilings, measured first: the rate of PyTorch's bf16 GEMM and the bandwidth of ``copy_``. Peers: SDPA (PyTorch's
choice, and cuDNN's), FlexAttention, ``F.cross_entropy``, ``F.layer_norm``, ``copy_``. Times are medians, each of work
that is queued without a wait; the last column is the side's time over ours. Operations of attention are those of the
keys that are seen: 4 D for each (query, key), 2.5 times as many backward. ``--device cpu --quick`` runs every line on
tiny shapes, to see that it runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from attention import BACKWARD, MEAN_DOCUMENT, PROMPT
from step import environment, write_whole
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from elle_mp.ops.dropout import DropoutKey, dropout
from elle_mp.ops.embedding import lookup
from elle_mp.ops.expand import Index, Noise, expand
from elle_mp.ops.expanded_attention import expanded_attention
from elle_mp.ops.library import what_is_wrong, what_is_wrong_with_cuda
from elle_mp.ops.linear_cross_entropy import linear_cross_entropy
from elle_mp.ops.norms import layer_norm, rms_norm, weighted_layer_norm, weighted_layer_norm_reference

Run = Callable[[], object]


@dataclass(frozen=True)
class Bench:
    """Where and how long to measure."""

    device: torch.device
    quick: bool
    seconds: float
    """Of measuring, for each line."""

    def size(self, full: int, quick: int) -> int:
        """A size of the full benchmark, or of the quick one."""
        return quick if self.quick else full

    def wait(self) -> None:
        """Until the device has done what was asked."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def median(self, run: Run) -> float:
        """Seconds of one ``run``."""
        run()
        self.wait()
        began = time.perf_counter()
        run()
        self.wait()
        once = max(time.perf_counter() - began, 1e-6)
        # Enough runs in a sample that waiting for the end of it does not count.
        inner = max(1, round(self.seconds / 8 / once))
        samples = []
        while len(samples) < 3 or (sum(samples) * inner < self.seconds and len(samples) < 9):
            began = time.perf_counter()
            for _ in range(inner):
                run()
            self.wait()
            samples.append((time.perf_counter() - began) / inner)
        return statistics.median(samples)


@dataclass(frozen=True)
class Ceilings:
    """Operations per second of a bf16 product, and bytes per second of a copy (those read and those written)."""

    gemm: float
    copy: float


@dataclass(frozen=True)
class Line:
    """One line of the table: what ran, how long, and the share of a ceiling that it reached."""

    case: str
    side: str
    seconds: float | None
    reached: str = ""
    ratio: str = ""


def ceilings(bench: Bench) -> Ceilings:
    """Measures both."""
    side, count = bench.size(8192, 256), bench.size(1 << 29, 1 << 18)
    a, b = (torch.randn(side, side, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    source, target = (torch.zeros(count, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    gemm = 2.0 * side**3 / bench.median(lambda: torch.mm(a, b))
    return Ceilings(gemm, 4.0 * count / bench.median(lambda: target.copy_(source)))


def sides(bench: Bench, case: str, runs: dict[str, Run], reached: Callable[[float], str]) -> Iterator[Line]:
    """The lines of one case; the first side is ours, what the others' ratios are to."""
    ours = None
    for name, run in runs.items():
        try:
            seconds = bench.median(run)
        except (RuntimeError, NotImplementedError, ImportError) as error:
            yield Line(case, name, None, f"does not run: {(str(error).strip().splitlines() or ['?'])[0][:80]}")
            continue
        ratio = "" if ours is None else f"{seconds / ours:.2f}"
        ours = seconds if ours is None and name == next(iter(runs)) else ours
        yield Line(case, name, seconds, reached(seconds), ratio)


def of_copy(top: Ceilings, count: float) -> Callable[[float], str]:
    """How a line that moves ``count`` bytes is described."""
    return lambda seconds: f"{count / seconds / 1e9:,.0f} GB/s, {count / seconds / top.copy:.0%} of copy"


def of_gemm(top: Ceilings, count: float) -> Callable[[float], str]:
    """How a line of ``count`` operations is described."""
    return lambda seconds: f"{count / seconds / 1e12:,.1f} TFLOP/s, {count / seconds / top.gemm:.0%} of GEMM"


class Attention:
    """One case of attention on both sides."""

    def __init__(self, bench: Bench, batch: int, length: int, heads: int, dim: int, packed: bool) -> None:
        generator = torch.Generator().manual_seed(1)
        self.device = bench.device
        shape = batch, length, heads, dim
        draws = [torch.randn(shape, generator=generator).to(bench.device, torch.bfloat16) for _ in range(4)]
        self.inputs, self.grad = [x.requires_grad_() for x in draws[:3]], draws[3]
        self.starts: Tensor | None = None
        place = torch.arange(length)
        if packed:
            cuts = torch.rand(batch, length, generator=generator) < 1 / MEAN_DOCUMENT
            cuts[:, :PROMPT], cuts[:, PROMPT] = False, True
            self.starts = torch.where(cuts, place, 0).cummax(1).values.to(bench.device)
        place = place.to(bench.device)
        seen = (place <= place[:, None]).expand(batch, -1, -1)
        if self.starts is not None:
            seen = seen & ((self.starts[:, None] == self.starts[:, :, None]) | (place < PROMPT))
        self.mask = None if self.starts is None else seen[:, None]
        self.operations = seen.sum().item() * heads * 4.0 * dim

    def ours(self, rate: float = 0.0) -> Tensor:
        """The op."""
        key = DropoutKey(1, torch.arange(self.inputs[0].shape[0])) if rate else None
        prompt = 0 if self.starts is None else PROMPT
        return expanded_attention(
            *self.inputs, causal=True, doc_starts=self.starts, prompt_length=prompt, dropout=rate, key=key
        )[0]

    def sdpa(self, backend: SDPBackend | None, rate: float = 0.0) -> Tensor:
        """PyTorch's, with the mask where there are documents."""
        q, k, v = (x.transpose(1, 2) for x in self.inputs)
        mask, causal = self.mask, self.mask is None
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, mask, rate, causal).transpose(1, 2)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, mask, rate, causal).transpose(1, 2)

    def flex(self) -> Callable[[], Tensor]:
        """FlexAttention with the mask as a function, compiled; the blocks it skips are found outside the timing."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        starts = self.starts
        batch, length = self.inputs[0].shape[:2]

        def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            own = q >= k
            return own if starts is None else own & ((starts[b, q] == starts[b, k]) | (k < PROMPT))

        blocks = create_block_mask(sees, batch if starts is not None else None, None, length, length, self.device)
        compiled = torch.compile(flex_attention)
        q, k, v = (x.transpose(1, 2) for x in self.inputs)
        return lambda: compiled(q, k, v, block_mask=blocks).transpose(1, 2)

    def both(self, forward: Callable[[], Tensor]) -> Run:
        """Forward and backward."""
        return lambda: torch.autograd.grad(forward(), self.inputs, self.grad)


def attention(bench: Bench, top: Ceilings) -> Iterator[Line]:
    """Dense and packed, forward and with backward; dropout where the peer has it, too."""
    length = bench.size(4096, 96)
    for dim in (64, 128):
        for packed in (False, True):
            case = Attention(bench, bench.size(4, 1), length, bench.size(16, 2), dim, packed)
            name = f"{'packed' if packed else 'causal'} S{length} D{dim} bf16"
            forwards: dict[str, Callable[[], Tensor]] = {"expanded_attention": case.ours}
            forwards["SDPA"] = lambda case=case: case.sdpa(None)
            if bench.device.type == "cuda":
                forwards["SDPA, cuDNN"] = lambda case=case: case.sdpa(SDPBackend.CUDNN_ATTENTION)
            if not bench.quick:
                forwards["FlexAttention"] = case.flex()
            yield from sides(bench, f"{name}, forward", dict(forwards), of_gemm(top, case.operations))
            with_grad = {side: case.both(forward) for side, forward in forwards.items()}
            operations = case.operations * (1 + BACKWARD)
            yield from sides(bench, f"{name}, forward + backward", with_grad, of_gemm(top, operations))
            dropped = {
                "expanded_attention": case.both(lambda case=case: case.ours(0.1)),
                "SDPA": case.both(lambda case=case: case.sdpa(None, 0.1)),
            }
            yield from sides(bench, f"{name}, dropout 0.1, forward + backward", dropped, of_gemm(top, operations))


def growth(bench: Bench, top: Ceilings) -> Iterator[Line]:
    """A matrix of 1.5 times the rows and columns, with and without noise."""
    rows, cols = bench.size(8192, 64), bench.size(8192, 64)
    source = torch.randn(rows, cols, device=bench.device)
    row_map, col_map = (torch.arange(n * 3 // 2) * n // (n * 3 // 2) for n in (rows, cols))
    scale = torch.full((len(col_map),), 0.75, dtype=torch.float64)
    index = Index(row_map, col_map, None, scale)
    out = torch.empty(index.shape, device=bench.device)
    noise = Noise(1, 0.1, 0, 0, col_map)
    count = 4.0 * (source.numel() + out.numel())
    other = torch.empty_like(out)
    name = f"[{rows}, {cols}] to [{out.shape[0]}, {out.shape[1]}] fp32"
    runs: dict[str, Run] = {"expand": lambda: expand(source, index, out), "copy_": lambda: other.copy_(out)}
    yield from sides(bench, name, runs, of_copy(top, count))
    noisy: dict[str, Run] = {"expand": lambda: expand(source, index, out, noise), "copy_": lambda: other.copy_(out)}
    yield from sides(bench, f"{name}, noise", noisy, of_copy(top, count))


def rows(bench: Bench, top: Ceilings) -> Iterator[Line]:
    """Norms, dropout and lookup of rows of hidden states, in bf16."""
    batch, length, width = bench.size(16, 2), bench.size(2048, 8), bench.size(2048, 64)
    x = torch.randn(batch, length, width, device=bench.device, dtype=torch.bfloat16, requires_grad=True)
    weight, bias = (torch.ones(width, device=bench.device, requires_grad=True) for _ in range(2))
    short = [p.detach().to(x.dtype).requires_grad_() for p in (weight, bias)]
    stat = torch.full((width,), 1 / width, device=bench.device)
    grad, other = torch.randn_like(x), torch.empty_like(x)
    key = DropoutKey(1, torch.arange(batch))
    count = 2.0 * x.numel() * x.element_size()
    name = f"[{batch * length}, {width}] bf16"

    def both(forward: Callable[[], Tensor], *inputs: Tensor) -> Run:
        return lambda: torch.autograd.grad(forward(), inputs, grad)

    copy: Run = lambda: other.copy_(x)  # noqa: E731
    yield from sides(
        bench,
        f"layer norm {name}, forward",
        {
            "weighted_layer_norm": lambda: layer_norm(x, weight, bias, 1e-5, stat),
            "F.layer_norm": lambda: F.layer_norm(x, (width,), *short, 1e-5),
            "copy_": copy,
        },
        of_copy(top, count),
    )
    yield from sides(
        bench,
        f"layer norm {name}, forward + backward",
        {
            "weighted_layer_norm": both(lambda: layer_norm(x, weight, bias, 1e-5, stat), x, weight, bias),
            "F.layer_norm": both(lambda: F.layer_norm(x, (width,), *short, 1e-5), x, *short),
        },
        of_copy(top, 2.5 * count),
    )
    yield from sides(
        bench,
        f"RMS norm {name}, forward + backward",
        {
            "rms_norm": both(lambda: rms_norm(x, weight, 1e-5), x, weight),
            "F.rms_norm": both(lambda: F.rms_norm(x, (width,), short[0], 1e-5), x, short[0]),
        },
        of_copy(top, 2.5 * count),
    )
    residual = torch.randn_like(x, requires_grad=True)
    fused, parts = (
        both(lambda op=op: op(x, residual, weight, bias, 1e-5, stat, p=0.1, key=key)[0], x, residual, weight, bias)
        for op in (weighted_layer_norm, weighted_layer_norm_reference)
    )
    yield from sides(
        bench,
        f"dropout, residual sum and layer norm {name}, forward + backward",
        {"weighted_layer_norm": fused, "one after the other": parts},
        of_copy(top, 4 * count),
    )
    dropped: dict[str, Run] = {"dropout": lambda: dropout(x, 0.1, key), "F.dropout": lambda: F.dropout(x, 0.1)}
    yield from sides(bench, f"dropout {name}, forward", {**dropped, "copy_": copy}, of_copy(top, count))
    table = torch.randn(bench.size(50304, 99), width, device=bench.device, dtype=x.dtype, requires_grad=True)
    ids = torch.randint(0, table.shape[0], (batch, length), device=bench.device)
    yield from sides(
        bench,
        f"lookup of {batch * length} of {table.shape[0]} rows, forward + backward",
        {
            "lookup": both(lambda: lookup(table, ids), table),
            "F.embedding": both(lambda: F.embedding(ids, table), table),
        },
        of_copy(top, count + table.numel() * table.element_size()),
    )


def cross_entropy(bench: Bench, top: Ceilings) -> Iterator[Line]:
    """Hidden states to loss and gradients; the memory that each side takes at its peak."""
    count, width, vocab = bench.size(16384, 32), bench.size(2048, 16), bench.size(50304, 99)
    hidden = torch.randn(count, width, device=bench.device, dtype=torch.bfloat16, requires_grad=True)
    table = (torch.randn(vocab, width, device=bench.device) * 0.02).to(hidden.dtype).requires_grad_()
    targets = torch.randint(0, vocab, (count,), device=bench.device)

    def theirs() -> Tensor:
        return F.cross_entropy((hidden @ table.T).float(), targets, reduction="sum")

    losses: dict[str, Callable[[], Tensor]] = {
        "linear_cross_entropy": lambda: linear_cross_entropy(hidden, table, targets),
        "F.cross_entropy(x @ W.T)": theirs,
    }
    runs: dict[str, Run] = {
        side: lambda loss=loss: torch.autograd.grad(loss(), (hidden, table)) for side, loss in losses.items()
    }
    name = f"[{count}, {width}] x [{vocab}, {width}] bf16"
    yield from sides(bench, name, runs, of_gemm(top, 6.0 * count * width * vocab))
    if bench.device.type == "cuda":
        for side, run in runs.items():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(bench.device)
            held = torch.cuda.memory_allocated(bench.device)
            run()
            bench.wait()
            peak = torch.cuda.max_memory_allocated(bench.device) - held
            yield Line(f"{name}, peak memory", side, None, f"{peak / 2**30:.2f} GiB")


PARTS = {"attention": attention, "expand": growth, "rows": rows, "cross_entropy": cross_entropy}


def table(lines: list[Line]) -> str:
    """A Markdown table."""
    rows = ["| case | side | ms | reached | time to ours |", "|---|---|---|---|---|"]
    for line in lines:
        taken = "" if line.seconds is None else f"{line.seconds * 1e3:.3f}"
        rows.append(f"| {line.case} | {line.side} | {taken} | {line.reached} | {line.ratio} |")
    return "\n".join(rows)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="tiny shapes: only to see that it runs")
    parser.add_argument("--markdown", type=Path)
    return parser.parse_args()


def main() -> None:
    """Measures, prints, and writes what was asked for."""
    options = arguments()
    device = torch.device(options.device)
    if options.quick:
        torch.set_num_threads(1)
    bench = Bench(device, options.quick, 0.001 if options.quick else 0.25)
    wrong = what_is_wrong_with_cuda() if device.type == "cuda" else what_is_wrong()
    top = ceilings(bench)
    where = environment(device) | {
        "CUDA": torch.version.cuda or "none",
        "library": wrong or "loaded",
        "GEMM bf16": f"{top.gemm / 1e12:.2f} TFLOP/s",
        "copy_": f"{top.copy / 1e9:.0f} GB/s, read and written",
    }
    print(where, flush=True)
    parts = []
    for part in options.only:
        lines = []
        for line in PARTS[part](bench, top):
            lines.append(line)
            print(table([line]).splitlines()[-1], flush=True)
        parts.append(f"## {part.replace('_', ' ')}\n\n{table(lines)}\n")
    if options.markdown:
        described = "\n".join(f"- {key}: {value}" for key, value in where.items())
        write_whole(options.markdown, f"# The CUDA kernels\n\n{described}\n\n" + "\n".join(parts))


if __name__ == "__main__":
    main()
