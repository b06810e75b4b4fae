"""Names for the parts of a training step, seen by torch's profiler and, on a GPU, by Nsight.

They are put on a model by the profiler and taken off again; a run that is not profiled has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import record_function

from elle_mp.models.layers import Attention, Mlp, Norm
from elle_mp.models.pipeline import LanguageModel
from elle_mp.train.optimizer import ShardedAdamW

PREFIX = "elle_mp/"
STEP, DATA, OPTIMIZER, COLLECTIVES = "step", "data", "optimizer", "collectives"
PARTS = (
    (Attention, ("forward",), "attention"),
    (Mlp, ("forward",), "mlp"),
    (Norm, ("forward", "of_sum"), "norm"),
)
"""Modules of the model, how they are entered, and what they are part of."""
METHODS = {"_embed": "embedding", "_losses": "loss"}
"""Parts that are methods of the model, not modules of it."""


@contextmanager
def named(part: str) -> Iterator[None]:
    """A range of this name."""
    with record_function(PREFIX + part):
        if torch.cuda.is_available():
            with torch.cuda.nvtx.range(part):
                yield
        else:
            yield


@contextmanager
def ranges(model: LanguageModel, optimizer: ShardedAdamW) -> Iterator[None]:
    """Has every part of the model, the optimizer's step, and every wait for a collective run in a range of its own."""
    with ExitStack() as stack:
        for part in model.parts:
            for module in part.modules():
                for kind, entries, name in PARTS:
                    if isinstance(module, kind):
                        for entry in entries:
                            stack.enter_context(_wrapped(module, entry, name))
            for method, name in METHODS.items():
                stack.enter_context(_wrapped(part, method, name))
        stack.enter_context(_wrapped(optimizer, "step", OPTIMIZER))
        stack.enter_context(_waits())
        yield


@contextmanager
def _wrapped(owner: Any, method: str, part: str) -> Iterator[None]:
    """``owner.method`` in a range, by an attribute of the instance."""
    setattr(owner, method, _in_range(getattr(owner, method), part))
    try:
        yield
    finally:
        delattr(owner, method)


@contextmanager
def _waits() -> Iterator[None]:
    """Waiting for a collective, which torch's profiler does not record by itself."""
    plain = dist.Work.wait
    setattr(dist.Work, "wait", _in_range(plain, COLLECTIVES))  # noqa: B010 (mypy lets no method be assigned)
    try:
        yield
    finally:
        setattr(dist.Work, "wait", plain)  # noqa: B010


def _in_range(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with named(part):
            return function(*args, **kwargs)

    return run
