"""Batches: what the models eat, made from order, samples, memories and masks.

A rank asks for its rows of a global batch; which rows those are is the caller's affair.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elle_mp.data.hashing import derive_key
from elle_mp.data.masking import IGNORED, MlmMasking
from elle_mp.data.order import NEW_DOMAIN, PhaseOrder
from elle_mp.data.packing import Objective, PackedSamples

SERIAL_BITS = 48
PHASE_BITS = 2


@dataclass
class Batch:
    """Rows of a global batch; T is the text length, the soft prompt is put in front by the model."""

    tokens: Tensor
    """int64 [b, T]."""
    targets: Tensor
    """int64 [b, T]; -100 where nothing is predicted."""
    domain: Tensor
    """int64 [b] row of the prompt table."""
    key: Tensor
    """int64 [b] unique for (stage, phase, slot) in a run: what dropout and masks are keyed by."""

    def rows(self, first: int, last: int) -> Batch:
        """The rows [first, last), as views."""
        part = slice(first, last)
        return Batch(self.tokens[part], self.targets[part], self.domain[part], self.key[part])

    def to(self, device: torch.device | str) -> Batch:
        """The same on another device."""
        moved = [item.to(device, non_blocking=True) for item in (self.tokens, self.targets, self.domain, self.key)]
        return Batch(*moved)

    def __len__(self) -> int:
        return int(self.tokens.shape[0])


@dataclass(frozen=True)
class DomainSamples:
    """The samples of one domain that a phase reads: all training samples of a new one, the memory of an
    earlier one.
    """

    domain: int
    """Row of the prompt table."""
    samples: PackedSamples
    memory: NDArray[np.int64] | None = None
    """[k] which of ``samples`` are in the memory; None: all of them."""

    def __len__(self) -> int:
        return len(self.samples) if self.memory is None else len(self.memory)

    def gather(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples ``indices`` [n] of the memory, or of all: int64 [n, length]."""
        return self.samples.gather(indices if self.memory is None else self.memory[indices])


def sample_key(stage: int, phase: int, serial: NDArray[np.int64]) -> NDArray[np.int64]:
    """One int64 [n] for (stage, phase, slot): 48 bits of slot, 2 of phase, the rest for the stage."""
    if not (0 <= stage < 1 << 12 and 0 <= phase < 1 << PHASE_BITS):
        raise ValueError(f"stage {stage} must be below {1 << 12} and phase {phase} below {1 << PHASE_BITS}")
    return serial | np.int64((stage << PHASE_BITS | phase) << SERIAL_BITS)


def to_batch(
    samples: NDArray[np.int64], domain: NDArray[np.int64], key: NDArray[np.int64], masking: MlmMasking | None
) -> Batch:
    """Packed samples [b, T+1] (causal) or [b, T] (with ``masking``) as tensors; ``domain`` and ``key`` are
    [b].
    """
    if masking is None:
        tokens, targets = np.ascontiguousarray(samples[:, :-1]), np.ascontiguousarray(samples[:, 1:])
    else:
        tokens, targets = masking(samples, key)
    return Batch(*(torch.from_numpy(item) for item in (tokens, targets, domain, key)))


class BatchBuilder:
    """The batches of one phase: a pure function of (step, rows).

    Args:
        seed, stage, phase: name the order; ``phase`` is 0 for recovery, 1 for training.
        new: the new domain; None in a recovery phase.
        memories: the earlier domains with their memories, in the order in which they were learnt.
        replay: share of the rows that the memories get beside a new domain.
        batch: rows of a global batch.
        masking: the rule of a masked language model; None for a causal one.
    """

    def __init__(
        self,
        *,
        seed: int,
        stage: int,
        phase: int,
        new: DomainSamples | None,
        memories: Sequence[DomainSamples],
        replay: float,
        batch: int,
        masking: MlmMasking | None = None,
    ) -> None:
        counts = [len(memory) for memory in memories]
        size = 0 if new is None else len(new)
        self.order = PhaseOrder(seed, stage, phase, size, counts, replay, batch)
        self.masking = masking
        self._sources: dict[int, DomainSamples] = dict(enumerate(memories))
        if new is not None:
            self._sources[NEW_DOMAIN] = new
        self._length = next(iter(self._sources.values())).samples.length

    def batch(self, step: int, first: int = 0, last: int | None = None) -> Batch:
        """Rows [first, last) (default: all) of the global batch of ``step``, which counts from 0 in the
        phase.
        """
        slots = self.order.slots(step)
        part = slice(first, self.order.batch if last is None else last)
        source, sample = slots.source[part], slots.sample[part]
        samples = np.empty((len(source), self._length), dtype=np.int64)
        domain = np.empty(len(source), dtype=np.int64)
        for number in np.unique(source).tolist():
            rows = source == number
            samples[rows] = self._sources[number].gather(sample[rows])
            domain[rows] = self._sources[number].domain
        key = sample_key(self.order.stage, self.order.phase, slots.serial[part])
        return to_batch(samples, domain, key, self.masking)


def valid_masking(
    objective: Objective, seed: int, vocab_size: int, mask_id: int, special_ids: Sequence[int]
) -> MlmMasking | None:
    """The masking rule for valid text: of another seed than training's; None for causal models."""
    if objective == "causal":
        return None
    return MlmMasking(derive_key("valid", seed), vocab_size, mask_id, special_ids)


def valid_batches(
    samples: DomainSamples,
    batch_size: int,
    max_batches: int | None = None,
    masking: MlmMasking | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """Batches of valid text, the same at every evaluation and under every layout.

    With fewer batches than the text has, samples are taken evenly from all of it. Masks and keys come from
    the sample's index. The last batch is filled up with rows that predict nothing, so all ranks see the same
    shapes.

    Args:
        samples: valid samples of a domain.
        batch_size: rows of a batch over all shards; a multiple of the number of shards.
        max_batches: how many batches at most; None for all of the text.
        masking: see :func:`valid_masking`; None for causal models.
        shard: (which, of how many): this caller's equal part of the rows of every batch.
    """
    which, shards = shard
    if batch_size % shards:
        raise ValueError(f"batch_size {batch_size} must be a multiple of the {shards} shards")
    total = len(samples)
    batches = -(-total // batch_size)
    if max_batches is not None and max_batches < batches:
        batches = max_batches
        chosen = np.arange(batches * batch_size, dtype=np.int64) * total // (batches * batch_size)
    else:
        chosen = np.arange(total, dtype=np.int64)
    rows = batch_size // shards
    for start in range(which * rows, batches * batch_size, batch_size):
        indices = chosen[start : start + rows]
        filling = rows - len(indices)
        indices = np.pad(indices, (0, filling))
        domain = np.full(rows, samples.domain, dtype=np.int64)
        batch = to_batch(samples.gather(indices), domain, indices, masking)
        if filling:
            batch.targets[rows - filling :] = IGNORED
        yield batch
