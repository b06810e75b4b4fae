"""Saves in the background: the tensors of that moment, whole or not there; loads bounded by the shard."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from elle_mp.checkpoint.agreement import background_group
from elle_mp.checkpoint.background import Background
from elle_mp.checkpoint.shards import Blocks, Place, share_out
from elle_mp.checkpoint.store import CheckpointStore
from elle_mp.errors import UserError
from tests.distributed_utils import run_distributed


@contextmanager
def _held_back(function: str = "fsync") -> Iterator[threading.Event]:
    """Background threads stop before they sync a file, until the event is set."""
    event, real, main = threading.Event(), getattr(os, function), threading.current_thread()

    def wait(*args: Any) -> Any:
        if threading.current_thread() is not main:
            event.wait(60)
        return real(*args)

    setattr(os, function, wait)
    try:
        yield event
    finally:
        event.set()
        setattr(os, function, real)


def _tensors(value: float) -> dict[str, Tensor]:
    """Over all ranks: rows, columns, one half only, a replica, an odd one that leaves a rank nothing, a plain one."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.arange(60.0).view(6, 10) + value
    return {
        "rows": distribute_tensor(whole, mesh, [Shard(0)]),
        "columns": distribute_tensor(whole.bfloat16(), mesh, [Shard(1)]),
        "replica": distribute_tensor(whole, mesh, [Replicate()]),
        "odd": distribute_tensor(whole[:1], mesh, [Shard(0)]),
        "step": torch.tensor(value),
    }


def _change(tensors: dict[str, Tensor]) -> None:
    for item in tensors.values():
        (item.to_local() if isinstance(item, DTensor) else item).add_(1000)


def _whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: item.full_tensor() if isinstance(item, DTensor) else item for name, item in tensors.items()}


def _train_meanwhile(folder: str) -> list[str]:
    store = CheckpointStore(Path(folder))
    tensors = _tensors(1.0)
    store.prepare(tensors)
    expected = _whole(_tensors(1.0))
    with _held_back() as go_on:
        store.save_async("a", tensors, {"k": 1}, permanent=True)
        assert store.latest() is None and store.saving
        _change(tensors)
        ones = torch.ones(3)
        dist.all_reduce(ones)  # the training's own collectives go on beside those of the save
        assert ones[0] == dist.get_world_size()
        go_on.set()
        store.wait()
    assert store.latest() == "a" and store.meta("a") == {"k": 1} and not store.saving
    memory = store._staging._memory.data_ptr()
    for number in range(4):
        store.save_async(f"s{number}", tensors, {}, keep=2)
    store.save_async("last", tensors, {}, permanent=True, keep=1)  # waits for the one before
    names = store.names()
    store.wait()
    assert store._staging._memory.data_ptr() == memory
    loaded = _tensors(-1.0)
    store.load("a", loaded)
    for name, value in _whole(loaded).items():
        assert torch.equal(value, expected[name]), name
    assert names[:1] == ["a"] and {"s2", "s3"} <= set(names)
    dist.barrier()
    return store.names()


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 3])
def test_it_saves_what_was_there_when_it_was_called(tmp_path: Path, world_size: int) -> None:
    for names in run_distributed(_train_meanwhile, world_size, str(tmp_path / "c")):
        assert names == ["a", "s3", "last"]  # permanent ones and the newest of the others
    store = CheckpointStore(tmp_path / "c")
    for name in store.names():
        store.verify(name)
    dcp_to_torch_save(store.folder / "a", tmp_path / "whole.pt")  # torch's own tool reads it
    whole = torch.load(tmp_path / "whole.pt")
    assert torch.equal(whole["rows"], torch.arange(60.0).view(6, 10) + 1)
    assert torch.equal(whole["columns"], whole["rows"].bfloat16()) and torch.equal(whole["odd"], whole["rows"][:1])


def _one_at_a_time(folder: str) -> None:
    store = CheckpointStore(Path(folder))
    with _held_back() as go_on:
        store.save_async("a", {"w": torch.ones(3)}, {})
        assert store.names() == []
        threading.Timer(0.3, go_on.set).start()
        began = time.monotonic()
        store.save("b", {"w": torch.ones(3)}, {})
        assert time.monotonic() - began > 0.2
    assert store.names() == ["a", "b"]
    store.close()


@pytest.mark.distributed
def test_one_save_at_a_time(tmp_path: Path) -> None:
    run_distributed(_one_at_a_time, 1, str(tmp_path))


def _cut_off(folder: str) -> str:
    """The last rank's files may not grow; all ranks train on and hear of it when they wait."""
    store = CheckpointStore(Path(folder))
    tensors = {"w": distribute_tensor(torch.ones(64, 1000), init_device_mesh("cpu", (2,)), [Shard(0)])}
    store.save_async("good", tensors, {})
    store.wait()
    if dist.get_rank() == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        store.save_async("bad", tensors, {})
        while not store.failed:
            time.sleep(0.01)
    finally:
        if dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    dist.all_reduce(torch.ones(1))
    with pytest.raises(UserError) as raised:
        store.wait()
    assert not store.failed
    dist.barrier()
    assert store.names() == ["good"] and store.latest() == "good" and not list(store.folder.glob("*.tmp-*"))
    dist.barrier()
    store.save_async("next", tensors, {})
    store.wait()
    assert store.latest() == "next"
    return str(raised.value)


@pytest.mark.distributed
def test_a_failure_reaches_every_rank(tmp_path: Path) -> None:
    first, second = run_distributed(_cut_off, 2, str(tmp_path))
    assert first == second and "cannot write checkpoint" in first and "rank 1:" in first and "File too large" in first
    assert "\n" not in first


def _die_at(call: int, folder: Path) -> bool:
    """Saves in the background of a child that kills itself before its ``call``-th change of the disk; if it lived."""
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL)
        return code == 0
    count = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if count == call:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return function(*args, **kwargs)

        return wrapper

    for name in ("replace", "mkdir", "fsync", "write"):
        setattr(os, name, counted(getattr(os, name)))
    try:
        store = CheckpointStore(folder)
        store.save_async("a", {"w": torch.ones(1000)}, {"value": 1.0}, keep=1)
        store.wait()
        os._exit(0)
    except BaseException:
        os._exit(1)


def _kill_everywhere(folder: str) -> tuple[int, set[float]]:
    store = CheckpointStore(Path(folder))
    seen, call = set(), 0
    store.save("a", {"w": torch.zeros(1000)}, {"value": 0.0})
    while not _die_at(call, store.folder):
        assert store.latest() == "a"
        loaded = {"w": torch.full((1000,), 5.0)}
        store.load("a", loaded)
        assert (loaded["w"] == store.meta("a")["value"]).all()
        seen.add(store.meta("a")["value"])
        store.save("a", {"w": torch.zeros(1000)}, {"value": 0.0})  # clears away what was left
        assert not list(store.folder.glob("*.tmp-*"))
        call += 1
    return call, seen


@pytest.mark.distributed
def test_a_kill_in_the_background_leaves_a_complete_latest(tmp_path: Path) -> None:
    ((steps, seen),) = run_distributed(_kill_everywhere, 1, str(tmp_path))
    assert steps > 8 and seen == {0.0, 1.0}


def _some_idle(folder: str) -> None:
    """Two ranks save in the background and load; the third has nothing and waits for neither."""
    ranks = [0, 1]
    everyone, aside = dist.new_group(ranks), background_group(ranks)
    mesh = init_device_mesh("cpu", (3,))  # any layout: the tensors below are given as blocks
    del mesh
    store = CheckpointStore(Path(folder), everyone, aside)
    if dist.get_rank() in ranks:
        mine = torch.full((2, 3), float(dist.get_rank()))
        tensors = {"w": Blocks((4, 3), torch.float32, {(2 * dist.get_rank(), 0): mine})}
        store.save_async("a", tensors, {}, keep=1)
        store.wait()
        with pytest.raises(UserError, match=r"blocks of tensor w \[5, 3\] do not make up the whole"):
            store.save_async("b", {"w": Blocks((5, 3), torch.float32, tensors["w"].blocks)}, {})
        mine.fill_(-1)
        store.load("a", tensors)
        assert (mine == dist.get_rank()).all()
    else:
        with pytest.raises(RuntimeError, match="not of the group"):
            store.save("c", {}, {})
    dist.barrier()
    assert store.latest() == "a"
    with pytest.raises(RuntimeError, match="needs a group"):
        other = CheckpointStore(Path(folder), everyone)
        other.save_async("d", {}, {}) if dist.get_rank() < 2 else other._open_background()


@pytest.mark.distributed
def test_some_ranks_may_idle(tmp_path: Path) -> None:
    run_distributed(_some_idle, 3, str(tmp_path))


def test_replicas_are_written_once_and_evenly() -> None:
    sizes = [(size, 1000) for size in (700, 10, 300, 40, 200, 500, 20, 90, 600, 30)]
    replicas = [Place(f"r{number}", shape, torch.float32, (0, 0), shape) for number, shape in enumerate(sizes)]
    own = [
        Place("own", (1200, 1000), torch.float32, (start, 0), (rows, 1000)) for start, rows in ((0, 900), (900, 300))
    ]
    held = [[own[0], *replicas], [*replicas, own[1]], replicas]
    written, everything = share_out(held)
    chosen = [held[rank][index] for rank, mine in enumerate(written) for index in mine]
    assert len(chosen) == len({(place.name, place.offsets) for place in chosen}) == 12
    assert own[0] in [held[0][index] for index in written[0]] and own[1] in [held[1][index] for index in written[1]]
    loads = [sum(held[rank][index].cost for index in mine) for rank, mine in enumerate(written)]
    assert max(loads) < 1.1 * min(loads)
    assert {name: len(blocks) for name, blocks in everything.items()} == {f"r{n}": 1 for n in range(10)} | {"own": 2}
    other = Place("r0", (700, 1000), torch.float64, (0, 0), (700, 1000))
    with pytest.raises(UserError, match="ranks hold different blocks of tensor r0"):
        share_out([[other], replicas])


def test_what_is_wrong_in_the_background_is_raised_once() -> None:
    background = Background("test")

    def work() -> None:
        raise UserError("no")

    background.start(work)
    while not background.failed:
        time.sleep(0.001)
    with pytest.raises(UserError, match="no"):
        background.start(lambda: None)
    background.wait()


MIB = 1 << 20


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def _load_shards(folder: str) -> list[tuple[int, int]]:
    """Bytes beyond the shards that a load held, and those that it read, by rows and by columns."""
    mesh, figures = init_device_mesh("cpu", (dist.get_world_size(),)), []
    store = CheckpointStore(Path(folder))
    for dim in (0, 1):
        tensors = {
            "big": distribute_tensor(torch.zeros(128, 128 * 1024), mesh, [Shard(dim)]),  # 64 MiB
            "wide": distribute_tensor(torch.zeros(64, 64 * 1024, dtype=torch.float64), mesh, [Shard(dim)]),
        }
        dist.barrier()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, read = _status("VmRSS:"), _bytes_read()
        store.load("a", tensors)
        figures.append((_status("VmHWM:") - before, _bytes_read() - read))
        for name, item in tensors.items():
            rows, columns = item.to_local(), item.to_local().shape[1]
            first = 0 if dim == 0 else dist.get_rank() * columns
            assert torch.equal(rows[:, 0], torch.full_like(rows[:, 0], 7 if name == "wide" else first)), name
    return figures


@pytest.mark.distributed
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc")
def test_a_load_reads_and_holds_its_shard_alone(tmp_path: Path) -> None:
    """80 MiB, written as two tensors by one process: one is 64 MiB in one piece, one is stored in another precision."""
    whole = 80 * MIB
    big = torch.arange(128 * 1024.0).repeat(128, 1)
    CheckpointStore(tmp_path).save("a", {"big": big, "wide": torch.full((64, 64 * 1024), 7.0)}, {})
    figures = run_distributed(_load_shards, 4, str(tmp_path))
    for rank, by_dim in enumerate(figures):
        for held, read in by_dim:
            assert held < 12 * MIB, rank  # blocks that are converted
            assert read - whole / 4 < (whole if rank == 1 else 0) + 4 * MIB, rank  # one rank hashes the one large file
