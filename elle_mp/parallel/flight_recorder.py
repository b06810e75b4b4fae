"""The last collectives of this rank, as torch's flight recorder has them.

torch keeps a ring of them for gloo and for NCCL; point-to-point transfers over gloo are not among them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

KEPT = 64
"""Collectives that are remembered."""


@dataclass(frozen=True)
class Collective:
    """One collective that this rank has entered.

    Attributes:
        record: its number among all of this rank.
        operation: ``all_reduce``, for example.
        group: what the group is for, as its description says (``mesh_tp``; ``default_pg``: all ranks).
        name: of the group, the same on all of its ranks and no other's.
        ranks: of the group.
        number: among those of the group; transfers between two ranks are counted on their own.
        transfer: it is one of these (recorded for NCCL only).
        shapes: of what went in.
        age: seconds since it was entered.
        limit: seconds after which torch gives it up.
        waiting: it has not ended.
    """

    record: int
    operation: str
    group: str
    name: str
    ranks: tuple[int, ...]
    number: int
    transfer: bool
    shapes: str
    age: float
    limit: float
    waiting: bool

    def __str__(self) -> str:
        group = "all ranks" if self.group == "default_pg" else self.group.removeprefix("mesh_")
        return f"{self.operation} #{self.number} of {group}"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Collective:
        """The inverse of :meth:`to_json`."""
        return cls(**fields | {"ranks": tuple(fields["ranks"])})


def start_recording() -> None:
    """Has torch keep the last collectives. To be called before the first process group is made."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(KEPT))


def collectives() -> list[Collective]:
    """The last collectives of this rank, in the order in which they were entered; none where torch keeps none."""
    members = {name: (group.group_desc, ranks_of(group)) for group, name in _groups().items()}
    now = time.time()
    found = [_collective(entry, members, now) for entry in _entries()]
    return sorted(found, key=lambda item: (-item.age, item.record))


def groups() -> list[dist.ProcessGroup]:
    """Every process group that this rank is in."""
    return list(_groups())


def ranks_of(group: dist.ProcessGroup) -> tuple[int, ...]:
    """The ranks of a group, as all ranks count them."""
    return tuple(dist.get_process_group_ranks(group))


def _groups() -> dict[dist.ProcessGroup, str]:
    if not dist.is_initialized():
        return {}
    return dict(dist.distributed_c10d._world.pg_names)


def _entries() -> Iterator[dict[str, Any]]:
    for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):
        dump = getattr(torch._C._distributed_c10d, name, None)
        if dump is not None:
            yield from json.loads(dump(includeCollectives=True, onlyActive=False)).get("entries", ())


def _collective(entry: dict[str, Any], members: dict[str, tuple[str, tuple[int, ...]]], now: float) -> Collective:
    name, described = (str(item) for item in entry["process_group"])
    return Collective(
        record=int(entry["record_id"]),
        operation=str(entry["profiling_name"]).rpartition(":")[2],
        group=described,
        name=name,
        ranks=members.get(name, ("", ()))[1],
        number=int(entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"]),
        transfer=bool(entry["is_p2p"]),
        shapes=" ".join(str(list(shape)) for shape in entry["input_sizes"]),
        age=now - int(entry["time_created_ns"]) / 1e9,
        limit=int(entry["timeout_ms"]) / 1e3,
        waiting=not entry["retired"],
    )
