"""The grid of ranks: named mesh axes ``dp_replicate x dp_shard x tp``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from elle_mp.config import ParallelConfig
from elle_mp.config_file import data_parallel_replicas

MESH_AXES = ("dp_replicate", "dp_shard", "tp")


@dataclass(frozen=True)
class Grid:
    """This rank's place in the mesh, and the process groups along its axes."""

    mesh: DeviceMesh
    device: torch.device

    @property
    def tp_mesh(self) -> DeviceMesh:
        return self.mesh["tp"]

    @property
    def fsdp_mesh(self) -> DeviceMesh:
        """What FSDP2 shards over; two-dimensional (HSDP) when there are replicas."""
        return self.mesh["dp_shard"] if self.size("dp_replicate") == 1 else self.mesh["dp_replicate", "dp_shard"]

    def size(self, axis: str) -> int:
        """Number of ranks along a mesh axis."""
        return self._sizes[axis]

    def rank(self, axis: str) -> int:
        """This rank's coordinate along a mesh axis."""
        return self._ranks[axis]

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return {axis: int(self.mesh.size(index)) for index, axis in enumerate(MESH_AXES)}

    @cached_property
    def _ranks(self) -> dict[str, int]:
        # Asked for with every parameter of a growth: the mesh looks up process groups each time.
        return {axis: int(self.mesh.get_local_rank(axis)) for axis in MESH_AXES}

    def group(self, axis: str) -> dist.ProcessGroup:
        """The process group along a mesh axis."""
        return self.mesh.get_group(axis)

    @property
    def tp_size(self) -> int:
        return self.size("tp")

    @property
    def tp_rank(self) -> int:
        return self.rank("tp")

    @property
    def dp_size(self) -> int:
        """Ranks that see different sequences."""
        return self.size("dp_replicate") * self.size("dp_shard")

    @property
    def dp_rank(self) -> int:
        return self.rank("dp_replicate") * self.size("dp_shard") + self.rank("dp_shard")


def start_distributed() -> torch.device:
    """Joins the process group that ``torchrun`` or ``srun`` described, or makes one of a single rank.

    Returns:
        The device of this rank: its GPU (NCCL), or the CPU (gloo).
    """
    use_cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            dist.init_process_group(backend, timeout=timedelta(minutes=10))
        else:
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
    return device


def make_grid(parallel: ParallelConfig, device: torch.device) -> Grid:
    """The mesh of a layout over all ranks of the default process group."""
    replicas = data_parallel_replicas(parallel, dist.get_world_size())
    shape = (replicas, parallel.dp_shard, parallel.tp)
    return Grid(init_device_mesh(device.type, shape, mesh_dim_names=MESH_AXES), device)
