"""Tokens with their prompts and positions, and dropout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from elle_mp.ops.dropout import DropoutKey, dropout, keep_mask, keep_scale, sample_keys
from elle_mp.ops.prompt_embedding import prompt_embedding, prompt_embedding_reference
from elle_mp.profiling.entry import Case, Entry, differentiated, normal, seeded

PROMPT = 16
DOMAINS = 3
RATE = 0.1


def embedding(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Case:
    """Rows of a table ``[V, D]``, prompts and positions: ``[B, S, D]``."""
    batch, length, width, vocabulary = shape
    prompt = min(PROMPT, length - 1)
    generator = seeded()
    sizes = ((vocabulary, width), (length, width), (DOMAINS, prompt, width))
    tables = tuple(normal(generator, size, dtype, device) for size in sizes)
    gradient = normal(generator, (batch, length, width), dtype, device)
    ids = torch.randint(0, vocabulary, (batch, length - prompt), generator=generator).to(device)
    domains = torch.randint(0, DOMAINS, (batch,), generator=generator).to(device)
    runs = (range(length),)

    def ours(table: Tensor, positions: Tensor, prompts: Tensor) -> Tensor:
        return prompt_embedding(table, ids, runs, position_table=positions, prompt_table=prompts, domains=domains)

    def reference(table: Tensor, positions: Tensor, prompts: Tensor) -> Tensor:
        return prompt_embedding_reference(
            table, ids, runs, position_table=positions, prompt_table=prompts, domains=domains
        )

    def plain(table: Tensor, positions: Tensor, prompts: Tensor) -> Tensor:
        return torch.cat((prompts[domains], F.embedding(ids, table)), 1) + positions

    out = float(gradient.numel() * gradient.element_size())
    return Case(
        differentiated(ours, tables, (gradient,)),
        {
            "F.embedding, cat, add": differentiated(plain, tables, (gradient,)),
            "reference": differentiated(reference, tables, (gradient,)),
        },
        moved=(2 * out, 3 * out + float(tables[0].numel() * tables[0].element_size())),
    )


def masks(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Case:
    """Dropout by key of ``[B, S, D]``; torch draws other masks, so it is a yardstick."""
    x, gradient = (normal(seeded(), shape, dtype, device) for _ in range(2))
    key = DropoutKey(1, torch.arange(shape[0]))

    def reference(x: Tensor) -> Tensor:
        kept = keep_mask(sample_keys(key).to(x.device), 0, shape[1], shape[2], RATE)
        return torch.where(kept, x * keep_scale(RATE), 0.0).to(x.dtype)

    size = float(x.numel() * x.element_size())
    return Case(
        differentiated(lambda x: dropout(x, RATE, key), (x,), (gradient,)),
        {"reference": differentiated(reference, (x,), (gradient,))},
        moved=(2 * size, 4 * size),
        yardsticks={"F.dropout": differentiated(lambda x: F.dropout(x, RATE), (x,), (gradient,))},
    )


ENTRIES = (
    Entry(
        "prompt_embedding",
        "BxSxDxV: sequences, positions, width, vocabulary",
        ((1, 512, 768, 4096), (4, 512, 768, 8192), (8, 2048, 768, 32768)),
        embedding,
    ),
    Entry("dropout", "BxSxD: sequences, positions, width", ((1, 512, 768), (4, 512, 768), (8, 2048, 1024)), masks),
)
