"""Which pipeline stage holds what: contiguous runs of layers of nearly equal cost (Huang et al., arXiv 1811.06965)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Part:
    """What one pipeline stage holds of a model.

    Attributes:
        layers: indices of its layers, as in the whole model.
        first: it holds the embeddings and takes tokens.
        last: it holds the head and gives losses or logits.
    """

    layers: range
    first: bool = True
    last: bool = True


@dataclass(frozen=True)
class Costs:
    """What the ends of a model and one of its layers take, forward and backward of one micro-batch.

    Attributes:
        layer: seconds of a layer.
        first: of the embeddings and prompts.
        last: of the final norm, the head and the loss.
    """

    layer: float
    first: float
    last: float

    def in_layers(self) -> tuple[float, float]:
        """The ends, in layers."""
        return self.first / self.layer, self.last / self.layer


def parts_of(sizes: Sequence[int]) -> tuple[Part, ...]:
    """The parts with these numbers of layers, in order."""
    ends = list(accumulate(sizes))
    return tuple(
        Part(range(end - size, end), index == 0, index == len(ends) - 1)
        for index, (size, end) in enumerate(zip(sizes, ends, strict=True))
    )


def balanced(layers: int, stages: int, first: float, last: float) -> tuple[int, ...]:
    """Layers of each stage so that the most expensive one is as cheap as can be; every stage has at least one.

    With fewer layers than stages (a model that is about to grow) the last stages have none.

    Args:
        first, last: cost of the embeddings and of the head, in layers.
    """
    if layers < stages:
        return (1,) * layers + (0,) * (stages - layers)
    if stages == 1:
        return (layers,)
    extra = [first, *[0.0] * (stages - 2), last]
    sizes = [1] * stages
    for _ in range(layers - stages):
        # Greedy is optimal as layers cost the same: each goes where the stage with it is cheapest.
        cheapest = min(range(stages), key=lambda stage: (sizes[stage] + 1 + extra[stage], stage))
        sizes[cheapest] += 1
    return tuple(sizes)
