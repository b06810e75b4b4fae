"""A checkpoint written under one layout fills the shards of another, bit for bit."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from elle_mp.checkpoint.store import CheckpointStore
from elle_mp.errors import UserError
from tests.distributed_utils import run_distributed

Layout = tuple[int, int, int]  # dp_replicate, dp_shard, tp

# Global shape, dtype and the dim cut over tp. 6 rows over tp=2 leave 3 for dp_shard=2 (2 + 1), and over
# dp_shard=4 2 + 2 + 2 + 0: uneven and empty shards.
DECLARED: dict[str, tuple[tuple[int, ...], torch.dtype, int | None]] = {
    "column": ((6, 5), torch.float32, 0),
    "row": ((5, 6), torch.float32, 1),
    "bias": ((6,), torch.bfloat16, 0),
    "norm": ((3,), torch.float64, None),
    "block": ((8, 2, 4), torch.float32, 0),
}


def _global_values(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, (shape, dtype, _) in DECLARED.items()
    }


def _sharded_module(layout: Layout, values: dict[str, Tensor]) -> nn.Module:
    """The tensors as FSDP2 over tensor-parallel parameters (dim 0 becomes a strided shard)."""
    mesh = init_device_mesh("cpu", layout, mesh_dim_names=("dp_replicate", "dp_shard", "tp"))
    module = nn.Module()
    for name, value in values.items():
        cut = DECLARED[name][2]
        local = value if cut is None else value.chunk(layout[2], cut)[mesh.get_local_rank("tp")]
        placement = Replicate() if cut is None else Shard(cut)
        parameter = DTensor.from_local(local.contiguous(), mesh["tp"], [placement], run_check=False)
        module.register_parameter(name, nn.Parameter(parameter))
    fsdp_mesh = mesh["dp_shard"] if layout[0] == 1 else mesh["dp_replicate", "dp_shard"]
    return fully_shard(module, mesh=fsdp_mesh)


def _expected_local(name: str, value: Tensor, layout: Layout) -> Tensor:
    """What this rank holds, by the definition: cut over tp, then dim 0 over dp_shard."""
    _, dp_shard, tp = layout
    tp_rank, dp_rank = dist.get_rank() % tp, dist.get_rank() // tp % dp_shard
    cut = DECLARED[name][2]
    if cut is not None:
        value = value.chunk(tp, cut)[tp_rank]
    pieces = list(value.chunk(dp_shard, 0))
    return pieces[dp_rank] if dp_rank < len(pieces) else value[:0]


def _plain(seed: int) -> dict[str, Tensor]:
    return {
        "step": torch.tensor(float(seed)),
        "position": torch.tensor([seed, 2**40]),
        "generator": torch.Generator().manual_seed(seed).get_state(),
        "nothing": torch.empty(0, 4),
        "view": torch.arange(12.0).reshape(3, 4).t() * seed,
    }


def _save(folder: str, layout: Layout, seed: int) -> None:
    module = _sharded_module(layout, _global_values(seed))
    CheckpointStore(Path(folder)).save("one", dict(module.named_parameters()) | _plain(seed), {"seed": seed})


def _load(folder: str, layout: Layout, seed: int) -> None:
    module = _sharded_module(layout, _global_values(seed + 1))
    plain = _plain(seed + 1)
    CheckpointStore(Path(folder)).load("one", dict(module.named_parameters()) | plain)
    for name, value in _global_values(seed).items():
        local = module.get_parameter(name).to_local()
        assert torch.equal(local, _expected_local(name, value, layout)), name
    for name, tensor in _plain(seed).items():
        assert torch.equal(plain[name], tensor), name


@pytest.mark.distributed
def test_every_layout_reads_every_other(tmp_path: Path) -> None:
    layouts = [(1, 2, 2), (1, 4, 1), (2, 2, 1), (2, 1, 2), (1, 1, 2), (1, 1, 1)]
    for seed, layout in enumerate(layouts):
        folder = tmp_path / str(seed)
        run_distributed(_save, layout[0] * layout[1] * layout[2], str(folder), layout, seed)
        CheckpointStore(folder).verify("one")
        other = layouts[(seed + 1) % len(layouts)]
        run_distributed(_load, other[0] * other[1] * other[2], str(folder), other, seed)
    run_distributed(_load, 4, str(tmp_path / "5"), (1, 2, 2), 5)


def _stages(folder: str) -> None:
    """Pipeline stages hold different tensors; a mesh of each stage's own ranks."""
    rank = dist.get_rank()
    meshes = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    value = torch.arange(10.0) * (1 + rank // 2)
    local = value.chunk(2)[rank % 2]
    mine = {f"stage{rank // 2}": DTensor.from_local(local, meshes["dp"], [Shard(0)], run_check=False)}
    store = CheckpointStore(Path(folder))
    store.save("pp", mine, {})
    store.load("pp", {name: torch.zeros_like(tensor) for name, tensor in mine.items()})
    both = {"stage0": torch.zeros(10), "stage1": torch.zeros(10)}
    store.load("pp", both)
    assert torch.equal(both["stage0"], torch.arange(10.0))
    assert torch.equal(both["stage1"], torch.arange(10.0) * 2)


@pytest.mark.distributed
def test_ranks_may_hold_different_tensors(tmp_path: Path) -> None:
    run_distributed(_stages, 4, str(tmp_path))


def _misfits(folder: str) -> dict[str, str]:
    """Each error as every rank sees it; only rank 1 asks for the wrong thing."""
    store = CheckpointStore(Path(folder))
    good = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    store.save("x", good, {})
    wrong = {
        "missing": good | {"c": torch.zeros(1)},
        "shape": good | {"b": torch.zeros(5)},
        "kind": good | {"b": torch.zeros(4, dtype=torch.int64)},
    }
    found = {}
    for case, tensors in wrong.items():
        with pytest.raises(UserError) as raised:
            store.load("x", tensors if dist.get_rank() == 1 else good)
        found[case] = str(raised.value)
    with pytest.raises(UserError) as raised:
        store.load("x", {"a": torch.zeros(2, 3)})
    found["extra"] = str(raised.value)
    with pytest.raises(UserError) as raised:
        store.load("y", good)
    found["name"] = str(raised.value)
    store.load("x", good)
    return found


@pytest.mark.distributed
def test_what_does_not_fit_is_named_on_every_rank(tmp_path: Path) -> None:
    first, second = run_distributed(_misfits, 2, str(tmp_path))
    assert first == second
    assert "rank 1: it holds no tensor c [1]" in first["missing"]
    assert "its tensor b is [4], this model's is [5]" in first["shape"]
    assert "its tensor b is torch.float32, this model's is torch.int64" in first["kind"]
    assert "this model has no tensor b [4]" in first["extra"]
    assert "no checkpoint y" in first["name"] and "newest: x" in first["name"]
    assert all("\n" not in message for message in first.values())


def _noise(folder: str) -> str:
    """What reaches the standard error of a save and a load, torch's own C++ and Python warnings included."""
    import os

    log = Path(folder) / f"stderr-{dist.get_rank()}"
    sys.stderr.flush()
    kept = os.dup(2)
    with log.open("wb") as handle:
        os.dup2(handle.fileno(), 2)
    try:
        module = _sharded_module((1, dist.get_world_size(), 1), _global_values(0))
        store = CheckpointStore(Path(folder) / "checkpoints")
        store.save("one", dict(module.named_parameters()) | _plain(0), {})
        store.load("one", dict(module.named_parameters()) | _plain(0))
        sys.stderr.flush()
    finally:
        os.dup2(kept, 2)
        os.close(kept)
    return log.read_text()


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2])
def test_nothing_is_printed(tmp_path: Path, world_size: int) -> None:
    assert run_distributed(_noise, world_size, str(tmp_path)) == [""] * world_size
