"""Perplexity of each domain's valid text, the same number under every layout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import exp

import torch
import torch.distributed as dist
from torch import Tensor

from elle_mp.data.batches import Batch
from elle_mp.models.pipeline import LanguageModel
from elle_mp.models.transformer import IGNORED
from elle_mp.parallel.data_parallel import release


@torch.no_grad()
def perplexity(model: LanguageModel, batches: Iterable[Batch]) -> float:
    """Exp of the mean cross entropy over all targets of ``batches``, which every rank passes alike.

    Each data-parallel rank takes every ``dp_size``-th sequence. Prompts are never targets, so runs with and without
    them compare.
    """
    grid = model.grid
    sums = torch.zeros(2, dtype=torch.float64, device=grid.device)
    for batch in batches:
        mine = _rows_of_rank(batch, grid.dp_rank, grid.dp_size).to(grid.device)
        sums[0] += model(mine.tokens, mine.domain, mine.targets).double()
        if grid.rank("pp") == grid.rank("cp") == 0:  # once for all ranks that have these rows
            sums[1] += int((mine.targets != IGNORED).sum())
    release(model)
    grid.sum(sums, "dp_replicate", "shard", "pp")
    return exp(float(sums[0] / sums[1])) if sums[1] else float("nan")


def _rows_of_rank(batch: Batch, rank: int, size: int) -> Batch:
    """Rows ``rank, rank + size, ...``; every rank gets as many, so that all issue the same collectives."""
    rows = len(batch.tokens)
    index = torch.arange(rank, -(-rows // size) * size, size)
    chosen = index.clamp(max=rows - 1)
    targets = batch.targets[chosen]
    targets[index >= rows] = IGNORED
    return Batch(batch.tokens[chosen], targets, batch.domain[chosen], batch.key[chosen])


@torch.no_grad()
def fixed_logits(model: LanguageModel, batch: Batch) -> Tensor:
    """This rank's part of the logits of a fixed batch, ``[B, T, V_local]``, padding and reserved ids left out; of no
    ids where they do not come out (all but the last stage of a pipeline)."""
    batch = batch.to(model.grid.device)
    logits: Tensor = model(batch.tokens, batch.domain)
    release(model)
    local = model.spec.padded_vocab // model.grid.tp_size
    real = min(max(model.spec.softmax_vocab - model.grid.tp_rank * local, 0), local)
    return logits[..., :real]


def largest_difference(before: Tensor, after: Tensor, model: LanguageModel) -> tuple[float, float]:
    """Largest change of a logit over all ranks: absolute, and relative to the largest logit.

    Args:
        before, after: this rank's parts of the logits of the same ids, ``[B, T, V_local]``. The ranks may share them
            otherwise than before: a larger table is cut elsewhere.
    """
    values = torch.zeros(2, dtype=torch.float64, device=before.device)
    for one, other in _same_ids(before, after, model):
        if one.numel():
            change = torch.stack([(one.double() - other.double()).abs().max(), one.double().abs().max()])
            values = torch.maximum(values, change)
    for axis in ("tp", "pp", "cp"):
        if model.grid.size(axis) > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=model.grid.group(axis))
    return float(values[0]), float(values[0] / values[1].clamp_min(1e-300))


def _same_ids(before: Tensor, after: Tensor, model: LanguageModel) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of both that belong to the same ids: what this rank has, or else one whole sequence at a time."""
    if model.grid.tp_size > 1:
        group = model.grid.group("tp")
        moved = torch.tensor(float(before.shape != after.shape), device=before.device)
        dist.all_reduce(moved, op=dist.ReduceOp.MAX, group=group)
        if moved > 0:
            for one, other in zip(before, after, strict=True):
                yield _all_ids(one, group), _all_ids(other, group)
            return
    yield before, after


def _all_ids(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``[T, V]`` of the parts ``[T, V_local]`` of all ranks, which need not be equally wide."""
    width = torch.tensor([part.shape[-1]], device=part.device)
    widths = [torch.empty_like(width) for _ in range(dist.get_world_size(group))]
    dist.all_gather(widths, width, group=group)
    sizes = [int(item) for item in widths]
    padded = part.new_zeros(*part.shape[:-1], max(sizes))
    padded[..., : part.shape[-1]] = part
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([item[..., :size] for item, size in zip(parts, sizes, strict=True)], dim=-1)
