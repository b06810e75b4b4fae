"""Times the rows in front of the first layer against PyTorch, in turns in one process, forward and backward.

    python benchmarks/embedding.py --markdown FILE

Ours is ``prompt_embedding``: tokens, a prompt of 16 tokens of each sequence's domain, positions, for ``bert`` their
LayerNorm, dropout. The peer is ``F.embedding`` and PyTorch's other operations, in lines "separate" this project's own
operations one after the other. Ids are drawn with probabilities of 1 over their rank. Times, ratios, bytes (of hidden
states, not of tables) and ``--cpu-time`` are as in ``benchmarks/norms.py``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from norms import DROPOUT, EPS, Case, Op, copy_rate, row
from step import environment, write_whole
from torch import Tensor

from elle_mp.ops.dropout import DropoutKey
from elle_mp.ops.library import instructions
from elle_mp.ops.prompt_embedding import prompt_embedding, prompt_embedding_reference

PROMPT, DOMAINS = 16, 5


class Tables:
    """Tables and ids of one type; has the face of the norms' inputs."""

    def __init__(self, options: argparse.Namespace, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(1)
        self.dtype, columns = dtype, options.columns
        shapes = ((options.vocabulary,), (DOMAINS, PROMPT), (options.length,), (), ())
        self.tables = [torch.randn(*shape, columns, generator=generator).to(dtype) for shape in shapes]
        self.x = torch.randn(options.batch, options.length, columns, generator=generator).to(dtype)
        chances = 1.0 / torch.arange(1.0, options.vocabulary + 1.0)
        count = options.batch * (options.length - PROMPT)
        self.ids = torch.multinomial(chances, count, replacement=True, generator=generator).view(options.batch, -1)
        self.domains = torch.arange(options.batch) % DOMAINS
        self.key = DropoutKey(3, torch.arange(options.batch))
        self.runs = (range(options.length),)

    def run(self, op: Op, backward: bool) -> tuple[Tensor, ...]:
        """Results, or the gradients of all tables that they depend on."""
        leaves = [x.detach().requires_grad_(backward) for x in self.tables]
        out = op(self, *leaves)
        if not backward:
            return out
        found = torch.autograd.grad(out, leaves, self.x, allow_unused=True)
        return tuple(x for x in found if x is not None)


def ours(embed: Callable[..., Tensor], bert: bool, p: float) -> Op:
    """This project's op, or its reference."""

    def run(i: Tables, table: Tensor, prompts: Tensor, places: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
        norm = (weight, bias, EPS, None) if bert else None
        tables = {"prompt_table": prompts, "position_table": places, "domains": i.domains}
        return (embed(table, i.ids, i.runs, norm=norm, p=p, key=i.key, **tables),)

    return run


def theirs(bert: bool, p: float) -> Op:
    """PyTorch's operations."""

    def run(i: Tables, table: Tensor, prompts: Tensor, places: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
        x = torch.cat((prompts[i.domains], F.embedding(i.ids, table)), 1) + places
        if bert:
            x = F.layer_norm(x, x.shape[-1:], weight, bias, EPS)
        return (F.dropout(x, p),)

    return run


def cases() -> list[Case]:
    """What is measured; hidden states are written forward, read backward, and written and read between the two."""
    found = []
    for name, bert in (("gpt", False), ("bert", True)):
        for p in (0.0, DROPOUT):
            case = f"{name}, dropout {p}"
            op = ours(prompt_embedding, bert, p)
            found.append(Case(case, op, theirs(bert, p), 4, comparable=p == 0.0))
            found.append(Case(f"{case}: separate", op, ours(prompt_embedding_reference, bert, p), 4))
    return found


def check(case: Case, tables: Tables) -> None:
    """Both sides compute the same result, where they should: PyTorch sums the gradients of frequent rows in bf16."""
    ours, theirs = (tables.run(op, False)[0].float() for op in (case.ours, case.theirs))
    far = (ours - theirs).abs().max() / theirs.abs().max()
    if case.comparable and far > (2e-2 if tables.dtype == torch.bfloat16 else 1e-5):
        raise SystemExit(f"{case.name}: the two sides differ by {far:.2g}")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--columns", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--repeats", type=int, default=15, help="measured pairs")
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
        "| case | type | ours ms | theirs ms | ratio | deciles | GB/s | of copy | others |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    print(where, *lines, sep="\n", flush=True)
    for name in options.dtype:
        tables = Tables(options, getattr(torch, name))
        copy = copy_rate(tables.x, options.repeats, clock)
        where[f"copy {name}"] = f"{copy / 1e9:.1f} GB/s"
        for case in cases():
            check(case, tables)
            lines.append(row(case, tables, options.repeats, copy, clock))
            print(lines[-1], flush=True)
    if options.markdown:
        title = f"# Embedding, forward and backward, V{options.vocabulary} B{options.batch} S{options.length}"
        described = "\n".join(f"- {key}: {value}" for key, value in where.items())
        table = "\n".join(lines)
        write_whole(options.markdown, f"{title} D{options.columns}\n\n{described}\n\n{table}\n")


if __name__ == "__main__":
    main()
