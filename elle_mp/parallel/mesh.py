"""The grid of ranks: named axes ``pp x dp_replicate x dp_shard x cp x tp``."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from math import prod

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from elle_mp.config import ParallelConfig
from elle_mp.config_layout import data_parallel_replicas
from elle_mp.parallel.flight_recorder import start_recording
from elle_mp.parallel.pipeline import Costs

MESH_AXES = ("pp", "dp_replicate", "shard", "tp")
"""Axes of the mesh on which parameters lie, outermost first; ``shard`` is ``dp_shard x cp``: ranks that share a
sequence share the parameters, too, and FSDP2 sums their gradients with those of other sequences."""

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""What a layout gives sizes to."""


@dataclass(frozen=True)
class Grid:
    """This rank's place in the layout, and the process groups along its axes.

    Attributes:
        mesh: over :data:`MESH_AXES`; ``None`` for one rank without process groups (a model that is only looked at).
        device: of this rank.
        parallel: the layout.
        everyone: the ranks that have a place, when others have none; ``None`` for all there are.
        fine_mesh: over :data:`AXES`, when ``dp_shard`` and ``cp`` are both more than one rank.
        costs: of the model on this grid, the same on all ranks; ``None`` where they are estimated. A growth leaves two
            models on the same ranks whose layers are shared out by different ones.
    """

    mesh: DeviceMesh | None
    device: torch.device
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    everyone: dist.ProcessGroup | None = None
    fine_mesh: DeviceMesh | None = None
    costs: Costs | None = None

    @property
    def active(self) -> bool:
        """Whether this rank has a place; one that has not waits (``parallel.idle_ranks``)."""
        return self.mesh is None or self.mesh.get_coordinate() is not None

    @property
    def members(self) -> range:
        """The ranks that have a place."""
        return range(prod(self.size(axis) for axis in MESH_AXES))

    @property
    def tp_mesh(self) -> DeviceMesh:
        return self._mesh["tp"]

    @property
    def _mesh(self) -> DeviceMesh:
        if self.mesh is None:
            raise RuntimeError("this grid has no mesh")
        return self.mesh

    @property
    def fsdp_mesh(self) -> DeviceMesh:
        """What FSDP2 shards over; two-dimensional (HSDP) when there are replicas."""
        return self._mesh["shard"] if self.size("dp_replicate") == 1 else self._mesh["dp_replicate", "shard"]

    def size(self, axis: str) -> int:
        """Number of ranks along an axis of :data:`MESH_AXES` or :data:`AXES`."""
        return self._sizes[axis]

    def rank(self, axis: str) -> int:
        """This rank's coordinate along an axis of :data:`MESH_AXES` or :data:`AXES`."""
        return self._ranks[axis]

    @cached_property
    def _sizes(self) -> dict[str, int]:
        sizes = {axis: 1 if self.mesh is None else int(self.mesh.size(index)) for index, axis in enumerate(MESH_AXES)}
        return sizes | {"dp_shard": sizes["shard"] // self.parallel.cp, "cp": self.parallel.cp}

    @cached_property
    def _ranks(self) -> dict[str, int]:
        # Asked for with every parameter of a growth: the mesh looks up process groups each time.
        place = None if self.mesh is None else self.mesh.get_coordinate()
        ranks = dict(zip(MESH_AXES, place or [0] * len(MESH_AXES), strict=True))
        shard, context = divmod(ranks["shard"], self.parallel.cp)
        return ranks | {"dp_shard": shard, "cp": context}

    def group(self, axis: str) -> dist.ProcessGroup:
        """The process group along an axis of :data:`MESH_AXES` or :data:`AXES`."""
        if axis in ("dp_shard", "cp") and self.fine_mesh is not None:
            return self.fine_mesh.get_group(axis)
        return self._mesh.get_group("shard" if axis in ("dp_shard", "cp") else axis)

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

    def local_length(self, length: int) -> int:
        """Positions on this rank, between sub-layers, of sequences of ``length`` positions."""
        return length // (self.size("cp") * (self.tp_size if self.parallel.sequence_parallel else 1))

    @property
    def pipeline_stages(self) -> int:
        """Runs of layers, over all pipeline ranks."""
        return self.size("pp") * self.parallel.stages_per_rank

    @property
    def my_stages(self) -> tuple[int, ...]:
        """The pipeline stages of this rank, in order. ``zbv``: one on the way down the V and one on the way up."""
        return tuple(stage for stage in range(self.pipeline_stages) if self.rank_of_stage(stage) == self.rank("pp"))

    def rank_of_stage(self, stage: int) -> int:
        """The pipeline coordinate of the ranks that hold a stage."""
        return self.parallel.rank_of_stage(stage)

    def sum(self, values: torch.Tensor, *axes: str) -> None:
        """Sums ``values`` in place over the ranks along ``axes``."""
        for axis in axes:
            if self.size(axis) > 1:
                dist.all_reduce(values, group=self.group(axis))

    def close(self) -> None:
        """Ends the grid's process groups; they would keep threads, connections and GPU memory to the end of the job.

        Nothing on this grid works afterwards, on no rank.
        """
        groups = [] if self.everyone is None else [self.everyone]
        for mesh in (self.mesh, self.fine_mesh):
            if mesh is not None and self.active:
                known = getattr(mesh, "_pg_registry", {})  # of flattened axes, too; DTensor's caches keep it
                groups += [*mesh.get_all_groups(), *known.values()]
                known.clear()
        for group in dict.fromkeys(groups):
            if group is not dist.group.WORLD:  # the mesh's own where an axis has all ranks
                dist.destroy_process_group(group)


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
        start_recording()
        backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            dist.init_process_group(backend, timeout=timedelta(minutes=10))
        else:
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
    return device


def make_grid(parallel: ParallelConfig, device: torch.device) -> Grid:
    """The mesh of a layout over the ranks of the default process group, or the first of them. Collective."""
    world_size = dist.get_world_size()
    replicas = data_parallel_replicas(parallel, world_size)
    shape = (parallel.pp, replicas, parallel.dp_shard * parallel.cp, parallel.tp)
    ranks = torch.arange(prod(shape), device="cpu").view(shape)
    everyone = None if ranks.numel() == world_size else dist.new_group(ranks.flatten().tolist())
    mesh = DeviceMesh(device.type, ranks, mesh_dim_names=MESH_AXES)
    fine_mesh = None
    if parallel.dp_shard > 1 and parallel.cp > 1:
        fine_ranks = ranks.view(parallel.pp, replicas, -1, parallel.cp, parallel.tp)
        fine_mesh = DeviceMesh(device.type, fine_ranks, mesh_dim_names=AXES)
    return Grid(mesh, device, parallel, everyone, fine_mesh)
