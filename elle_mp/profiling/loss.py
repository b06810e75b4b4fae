"""The last projection with its cross entropy, against the two spelled out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from elle_mp.ops.linear_cross_entropy import linear_cross_entropy
from elle_mp.profiling.entry import Case, Entry, differentiated, normal, seeded

STD = 0.02


def loss(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Case:
    """Hidden states ``[N, D]`` and a table ``[V, D]`` to the mean loss."""
    rows, width, vocabulary = shape
    generator = seeded()
    hidden = normal(generator, (rows, width), dtype, device)
    table = STD * normal(generator, (vocabulary, width), dtype, device)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator).to(device)
    gradient = torch.ones((), device=device)

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(x, w, targets).float() / rows

    def plain(x: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(x @ w.t(), targets, reduction="mean").float()

    product = 2.0 * rows * width * vocabulary
    read = float((hidden.numel() + table.numel()) * hidden.element_size())
    return Case(
        differentiated(ours, (hidden, table), (gradient,)),
        {"F.cross_entropy(x @ W.T)": differentiated(plain, (hidden, table), (gradient,))},
        moved=(read, 2 * read),
        operations=(product, 3 * product),
    )


ENTRIES = (
    Entry(
        "linear_cross_entropy",
        "NxDxV: rows, width, vocabulary",
        ((256, 256, 4096), (1024, 768, 8192), (2048, 768, 32768)),
        loss,
    ),
)
