"""Packing: the documents of a data set as one stream, cut into samples of one length.

No token is left out but the few at the end that do not fill a sample; documents are kept apart by their end
marks.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from elle_mp.data.hashing import compiled_helpers
from elle_mp.data.indexed import IndexedDataset
from elle_mp.errors import UserError

Objective = Literal["causal", "mlm"]


class PackedSamples:
    """Samples of ``length`` tokens that begin every ``stride`` tokens of a stream.

    Args:
        dataset: a data set, or its stream of tokens [N].
        length: tokens of a sample.
        stride: from one beginning to the next; ``length`` when not given.
    """

    def __init__(self, dataset: IndexedDataset | NDArray[Any], length: int, stride: int | None = None) -> None:
        self.stream = dataset.tokens if isinstance(dataset, IndexedDataset) else dataset
        self.length = length
        self.stride = stride or length
        if length < 1 or self.stride < 1:
            raise ValueError(f"length {length} and stride {self.stride} must be positive")

    def __len__(self) -> int:
        return max(0, (self.stream.size - self.length) // self.stride + 1)

    def gather(self, indices: NDArray[np.integer]) -> NDArray[np.int64]:
        """The samples ``indices`` [n] as int64 [n, length]; an index outside raises IndexError."""
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(f"samples {wanted.min()} to {wanted.max()} asked for, there are {len(self)}")
        native = compiled_helpers()
        if native is None:
            return self.gather_numpy(wanted)
        samples: NDArray[np.int64] = native.gather(self.stream, wanted * self.stride, self.length)
        return samples

    def gather_numpy(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """:meth:`gather` in NumPy."""
        places = (indices * self.stride)[:, None] + np.arange(self.length)
        return self.stream[places].astype(np.int64)


def pack(dataset: IndexedDataset, text_length: int, objective: Objective, name: str) -> PackedSamples:
    """Samples for ``text_length`` text positions.

    ``causal``: a sample has one token more, the last target, and samples overlap by it (as Megatron packs),
    so every token is predicted once. ``mlm``: samples lie side by side.

    Raises:
        UserError: ``dataset`` is too short for one sample; the message begins with ``name``.
    """
    length = text_length + 1 if objective == "causal" else text_length
    samples = PackedSamples(dataset, length, text_length)
    if len(samples) == 0:
        raise UserError(
            f"{name}: {dataset.num_tokens} tokens of text are too few for one sample of {length}; "
            f"give more text or a smaller model.seq_len"
        )
    return samples
