"""The memory of a finished domain: a fixed, seeded subset of its packed training samples."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from elle_mp.data.hashing import derive_key
from elle_mp.data.indexed import IndexedDataset
from elle_mp.data.order import permute
from elle_mp.errors import UserError


def check_budget(text_length: int, budget_tokens: int) -> None:
    """Raises :class:`UserError` when ``memory.tokens`` holds no whole sample; cheap, for before the start."""
    if budget_tokens < text_length:
        raise UserError(
            f"memory.tokens={budget_tokens} holds no whole sample of {text_length} text tokens; "
            f"the smallest that works is {text_length}"
        )


def choose_memory(
    num_samples: int, text_length: int, budget_tokens: int, seed: int, domain: str | int
) -> NDArray[np.int64]:
    """Which samples of a domain are kept: [k] indices in rising order, the same for the same arguments.

    Args:
        num_samples: packed training samples of the domain.
        text_length: text tokens of a sample.
        budget_tokens: tokens to keep; k = min(num_samples, budget_tokens // text_length). A larger budget
            keeps a superset of what a smaller one keeps.
        seed: the run's seed.
        domain: the domain's name or number.

    Raises:
        UserError: the budget is smaller than one sample.
    """
    check_budget(text_length, budget_tokens)
    count = min(num_samples, budget_tokens // text_length)
    chosen = permute(np.arange(count, dtype=np.uint64), num_samples, derive_key("memory", seed, domain))
    return np.sort(chosen.astype(np.int64))


def long_document_note(dataset: IndexedDataset, budget_tokens: int, domain: str) -> str | None:
    """One line for the log when a document is longer than the whole memory, else None.

    Such a document is cut into samples like any other: training reads all of it, the memory keeps parts of
    it.
    """
    longest = int(dataset.lengths.max()) if len(dataset) else 0
    if longest <= budget_tokens:
        return None
    return (
        f"domain {domain}: its longest document has {longest} tokens, more than "
        f"memory.tokens={budget_tokens}; training reads all of it, the memory keeps parts of it"
    )
