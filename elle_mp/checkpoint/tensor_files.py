"""Named tensors to files and back through ``torch.distributed.checkpoint``, whatever the layouts."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from elle_mp.checkpoint.agreement import reason, world_size
from elle_mp.errors import UserError


class _Writer(FileSystemWriter):
    """Says why this rank could not write, before the error loses its cause on the way to the others."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            raise UserError(reason(error)) from error


def write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes ``tensors`` into ``folder``: each rank what it holds, replicas once; synced. Collective.

    Raises:
        CheckpointException: (a ``BaseException``) a rank could not write; on all ranks.
    """
    with _quiet():
        save(
            _detached(tensors),
            storage_writer=_Writer(folder, single_file_per_rank=True, sync_files=True),
            no_dist=world_size() == 1,
        )


def read_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills ``tensors`` in place from ``folder``; each rank reads what it holds. Collective.

    Raises:
        CheckpointException: (a ``BaseException``) a rank could not read; on all ranks.
    """
    with _quiet():
        load(_detached(tensors), storage_reader=FileSystemReader(folder), no_dist=world_size() == 1)


def stored_tensors(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Global shape and dtype of every tensor in ``folder``, by name."""
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {
        name: (item.size, item.properties.dtype)
        for name, item in stored.items()
        if isinstance(item, TensorStorageMetadata)
    }


def check_fit(
    stored: Mapping[str, tuple[torch.Size, torch.dtype]],
    wanted: Mapping[str, tuple[torch.Size, torch.dtype]],
    everywhere: set[str] | None,
) -> None:
    """Compares what a checkpoint holds with what is to be filled.

    Args:
        wanted: this rank's tensors: global shape and dtype by name.
        everywhere: the names that any rank wants (pipeline stages want different ones); ``None`` to leave alone
            what nobody wants.

    Raises:
        UserError: a tensor is missing, is left over, or has another shape or kind of number; names the first.
    """
    for name, (shape, dtype) in wanted.items():
        if name not in stored:
            raise UserError(f"it holds no tensor {name} {list(shape)}")
        have, have_dtype = stored[name]
        if have != shape:
            raise UserError(f"its tensor {name} is {list(have)}, this model's is {list(shape)}")
        if have_dtype != dtype and not (have_dtype.is_floating_point and dtype.is_floating_point):
            raise UserError(f"its tensor {name} is {have_dtype}, this model's is {dtype}")
    extra = [] if everywhere is None else [name for name in stored if name not in everywhere]
    if extra:
        more = f" (nor {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise UserError(f"this model has no tensor {extra[0]} {list(stored[extra[0]][0])}{more}")


def _detached(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in tensors.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch's remarks about its own interfaces from the user; failures are raised, not logged."""
    logger = logging.getLogger("torch.distributed.checkpoint")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
