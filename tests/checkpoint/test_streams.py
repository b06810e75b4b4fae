"""Checkpoints read and written block by block: the same bits, bounded memory, whole or not there."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from elle_mp.checkpoint import stream_reader
from elle_mp.checkpoint.store import CheckpointStore
from elle_mp.checkpoint.stream_reader import StoredTensors
from elle_mp.checkpoint.stream_writer import blocks
from elle_mp.errors import UserError
from elle_mp.ops.random import Bounds
from tests.checkpoint import test_layouts as layouts
from tests.distributed_utils import run_distributed


def _values(seed: int = 0) -> dict[str, Tensor]:
    """Every rank and kind of number that a checkpoint has held, and some that it has not."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "matrix": numbers(37, 29).float(),
        "wide": numbers(3, 1000),
        "cube": numbers(4, 3, 50).to(torch.bfloat16),
        "vector": numbers(101).half(),
        "step": numbers(),
        "one": numbers(1, 1, 1).float(),
        "position": torch.tensor([3, 2**40]),
        "state": torch.Generator().manual_seed(seed).get_state(),
        "mask": numbers(7, 5) > 0,
        "nothing": torch.empty(0, 4),
        "no columns": torch.empty(3, 0, dtype=torch.int16),
        "transposed": numbers(8, 9).t(),
        "complex": torch.complex(numbers(6, 4), numbers(6, 4)),
        "unsigned": (numbers(9, 2).abs() * 1000).to(torch.uint16),
    }


def _declared(values: dict[str, Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(value.shape), value.dtype) for name, value in values.items()}


def _part(value: Tensor, bounds: Bounds) -> Tensor:
    return value[tuple(slice(low, high) for low, high in bounds)]


def _save_streamed(store: CheckpointStore, name: str, values: dict[str, Tensor], block_bytes: int = 256) -> None:
    store.save_streamed(
        name, _declared(values), lambda key, bounds: _part(values[key], bounds), {}, block_bytes=block_bytes
    )


def _random_bounds(shape: tuple[int, ...], generator: torch.Generator) -> Bounds:
    ends = [sorted(torch.randint(0, size + 1, (2,), generator=generator).tolist()) for size in shape]
    return tuple((low, high) for low, high in ends)


def _check_reads(stored: StoredTensors, values: dict[str, Tensor], tries: int = 25) -> None:
    """The whole of each tensor, each of its rows, and random blocks of it are what slicing gives."""
    generator = torch.Generator().manual_seed(1)
    assert stored.tensors == _declared(values)
    for name, value in values.items():
        whole: Bounds = tuple((0, size) for size in value.shape)
        rows = [((row, row + 1), *whole[1:]) for row in range(value.shape[0])] if value.dim() else []
        for bounds in [whole, *rows, *(_random_bounds(tuple(value.shape), generator) for _ in range(tries))]:
            block = stored.read(name, bounds)
            assert block.is_contiguous() and torch.equal(block, _part(value, bounds)), (name, bounds)


def test_blocks_cover_a_tensor_once() -> None:
    for shape in [(), (0, 4), (5,), (1,), (3, 7, 11), (2, 1000), (1, 1, 300), (50, 3)]:
        for block_bytes in [1, 4, 40, 100, 10**6]:
            seen = torch.zeros(shape, dtype=torch.int64)
            places = []
            for bounds in blocks(shape, 4, block_bytes):
                assert prod(high - low for low, high in bounds) * 4 <= max(block_bytes, 4)
                _part(seen, bounds).add_(1)
                places.append(tuple(low for low, _ in bounds))
            assert bool((seen == 1).all()) and places == sorted(set(places)), (shape, block_bytes)
    assert list(blocks((10, 5), 4, 60)) == [((0, 3), (0, 5)), ((3, 6), (0, 5)), ((6, 9), (0, 5)), ((9, 10), (0, 5))]


def test_any_block_is_what_slicing_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path)
    values = _values()
    store.save("a", values, {"seed": 1})
    stored = StoredTensors(tmp_path / "a", check_hashes=True)
    assert stored.meta == {"seed": 1}
    _check_reads(stored, values)
    monkeypatch.setattr(stream_reader, "_SCRATCH", 100)  # a few rows, or part of one, at a time
    _check_reads(StoredTensors(tmp_path / "a"), values)
    with pytest.raises(UserError, match="holds no tensor other"):
        stored.read("other", ())
    for bounds in [(), ((0, 38), (0, 29)), ((-1, 2), (0, 29)), ((3, 2), (0, 29)), ((0, 1),)]:
        with pytest.raises(ValueError, match="no block"):
            stored.read("matrix", bounds)


def test_only_the_rows_concerned_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"w": torch.arange(4e6).reshape(1000, 4000)}
    CheckpointStore(tmp_path).save("a", values, {})
    read_at = os.preadv
    counted: list[int] = []
    monkeypatch.setattr(os, "preadv", lambda *args: counted.append(read_at(*args)) or counted[-1])
    stored = StoredTensors(tmp_path / "a")
    for bounds in [((500, 503), (0, 4000)), ((7, 10), (40, 50))]:
        counted.clear()
        assert torch.equal(stored.read("w", bounds), _part(values["w"], bounds))
        assert 3 * 4000 * 4 <= sum(counted) < 3 * 4000 * 4 + 40_000, counted  # and a look at the zip
    counted.clear()
    stored.read("w", ((0, 1), (0, 4000)))
    assert sum(counted) == 4000 * 4  # which is remembered


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [(1, 1, 1), (1, 1, 2), (1, 2, 1), (1, 2, 2), (2, 1, 2), (1, 4, 1)])
def test_blocks_of_every_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: tuple[int, int, int]) -> None:
    run_distributed(layouts._save, prod(layout), str(tmp_path), layout, 3)
    values = layouts._global_values(3) | layouts._plain(3)
    _check_reads(StoredTensors(tmp_path / "one"), values)
    monkeypatch.setattr(stream_reader, "_SCRATCH", 8)
    _check_reads(StoredTensors(tmp_path / "one"), values)


def _streamed(folder: str) -> tuple[list[tuple[str, Bounds]], int]:
    """Saves block by block and loads, plain and as shards; returns this rank's blocks and the bytes reported."""
    values = _values()
    store = CheckpointStore(Path(folder))
    asked: list[tuple[str, Bounds]] = []
    reported: list[int] = []

    def produce(name: str, bounds: Bounds) -> Tensor:
        asked.append((name, bounds))
        return _part(values[name], bounds).requires_grad_(values[name].is_floating_point())

    store.save_streamed(
        "a", _declared(values), produce, {"k": 1}, permanent=True, block_bytes=256, progress=reported.append
    )
    loaded = {name: torch.zeros_like(value) for name, value in values.items()}
    store.load("a", loaded)
    for name, value in values.items():
        assert torch.equal(loaded[name], value), name
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for dim in (0, 1):
        shards = {"matrix": distribute_tensor(torch.zeros(37, 29), mesh, [Shard(dim)])}
        store.load("a", shards, partial=True)
        local = values["matrix"].chunk(dist.get_world_size(), dim)[dist.get_rank()]
        assert torch.equal(shards["matrix"].to_local(), local)
    return asked, sum(reported)


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_streamed_checkpoint_is_an_ordinary_one(tmp_path: Path, world_size: int) -> None:
    results = run_distributed(_streamed, world_size, str(tmp_path / "c"))
    values = _values()
    store = CheckpointStore(tmp_path / "c")
    assert store.latest() == "a" and store.meta("a") == {"k": 1} and store.prune(0) == []
    store.verify("a")
    _check_reads(StoredTensors(store.folder / "a"), values)
    asked = [block for share, _ in results for block in share]
    assert (
        len(set(asked))
        == len(asked)
        == sum(len(list(blocks(shape, dtype.itemsize, 256))) for shape, dtype in _declared(values).values())
    )
    assert sum(reported for _, reported in results) == sum(value.nbytes for value in values.values())
    shares = [len(share) for share, _ in results]
    assert max(shares) - min(shares) <= 2
    dcp_to_torch_save(store.folder / "a", tmp_path / "whole.pt")  # torch's own tool reads it
    for name, value in torch.load(tmp_path / "whole.pt").items():
        assert torch.equal(value, values[name]), name


def test_it_can_be_streamed_from_checkpoint_to_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    values = _values()
    store.save("a", values, {})
    stored = StoredTensors(tmp_path / "a")
    store.save_streamed("a", stored.tensors, stored.read, {"again": True}, block_bytes=100)  # replaces its source
    assert store.names() == ["a"] and store.meta("a") == {"again": True}
    _check_reads(StoredTensors(tmp_path / "a", check_hashes=True), values)


def test_small_tensors_are_written_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {f"bias{number}": torch.full((16,), float(number)) for number in range(1000)}
    write = os.write
    calls: list[int] = []
    monkeypatch.setattr(os, "write", lambda *args: calls.append(write(*args)) or calls[-1])
    _save_streamed(CheckpointStore(tmp_path), "a", values)
    assert len(calls) < 20
    _check_reads(StoredTensors(tmp_path / "a", check_hashes=True), values, tries=1)


_MEMORY = """
import sys
from pathlib import Path
import torch
from elle_mp.checkpoint.store import CheckpointStore
from elle_mp.checkpoint.stream_reader import StoredTensors

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) // 1024

torch.set_num_threads(1)
mib, block_bytes = 1 << 20, int(sys.argv[2])
store = CheckpointStore(Path(sys.argv[1]))
tensors = {"big": ((200, 1 << 18), torch.float32)} | {f"t{i}": ((8, 1 << 18), torch.float32) for i in range(25)}
make = lambda name, bounds: torch.full([high - low for low, high in bounds], float(bounds[0][0]))
before = status("VmRSS:")
store.save_streamed("a", tensors, make, {}, block_bytes=block_bytes)
stored = StoredTensors(store.folder / "a")
store.save_streamed("b", stored.tensors, stored.read, {}, block_bytes=block_bytes)
print(max(0, status("VmHWM:") - before))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_memory_is_bounded_by_the_block(tmp_path: Path) -> None:
    """400 MiB, half in one tensor and half in many that are one block each."""

    def peak(block_bytes: int) -> int:
        command = [sys.executable, "-c", _MEMORY, str(tmp_path / str(block_bytes)), str(block_bytes)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        shutil.rmtree(tmp_path / str(block_bytes))
        return int(done.stdout)

    assert peak(8 << 20) < 60  # MiB
    assert peak(256 << 20) > 150  # the measure sees a block of 200 MiB


def _cut_off(folder: str, rank: int) -> str:
    """Saves with a limit on the size of files on one rank."""
    import resource

    values = {"w": torch.ones(1000, 1000)}
    store = CheckpointStore(Path(folder))
    store.save("good", {"step": torch.tensor(1.0)}, {})
    limited = dist.get_rank() == rank
    if limited:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, hard))
    try:
        with pytest.raises(UserError) as raised:
            _save_streamed(store, "bad", values, 1 << 18)
    finally:
        if limited:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    assert store.names() == ["good"] and store.latest() == "good"
    store.verify("good")
    return str(raised.value)


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_file_that_cannot_be_written_costs_nothing(tmp_path: Path, world_size: int) -> None:
    messages = run_distributed(_cut_off, world_size, str(tmp_path), world_size - 1)
    assert len(set(messages)) == 1
    assert "cannot write checkpoint" in messages[0] and "File too large" in messages[0] and "\n" not in messages[0]
    assert {path.name for path in tmp_path.iterdir()} == {"good", "latest"}


def _truncated_source(folder: str) -> str:
    """The source loses its end while it is read, on the last rank only."""
    store = CheckpointStore(Path(folder) / "out")
    store.save("old", {"step": torch.tensor(1.0)}, {})
    stored = StoredTensors(Path(folder) / "in" / "a")
    dist.barrier()
    data = next((Path(folder) / "in" / "a").glob("*.distcp"))
    if dist.get_rank() == 0:
        os.truncate(data, data.stat().st_size - 200_000)
    dist.barrier()
    with pytest.raises(UserError) as raised:
        store.save_streamed("new", stored.tensors, stored.read, {}, block_bytes=100_000)
    dist.barrier()  # rank 0 removes what was written
    assert store.names() == ["old"] and not list(store.folder.glob("*.tmp-*"))
    return str(raised.value)


@pytest.mark.parametrize("refuses", ["opening", "writing", "nothing"])
def test_any_file_system_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: str) -> None:
    """Some refuse ``O_DIRECT`` when the file is opened, some when it is written: then the page cache is used."""
    opened, wrote, direct = os.open, os.write, []

    def open_(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_DIRECT and refuses == "opening":
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return opened(path, flags, *args, **kwargs)

    def write(descriptor: int, data: Any) -> int:
        uncached = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT
        if uncached and refuses == "writing":
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        direct.append((bool(uncached), len(data)))
        return wrote(descriptor, data)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "write", write)
    store = CheckpointStore(tmp_path)
    values = {"w": torch.arange(5e6).view(1000, 5000), "end": torch.ones(3)}  # 20 MB: several buffers and a rest
    _save_streamed(store, "a", values, 1 << 20)
    assert [uncached for uncached, size in direct if size > 1 << 20] == [refuses == "nothing"] * 2 + [False]
    store.verify("a")
    _check_reads(StoredTensors(tmp_path / "a"), values, 3)


@pytest.mark.distributed
def test_a_source_that_is_cut_short_is_named(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "in")
    values = {"w": torch.ones(500, 1000)}
    _save_streamed(store, "a", values, 100_000)
    first, second = run_distributed(_truncated_source, 2, str(tmp_path))
    data = next((store.folder / "a").glob("*.distcp"))
    assert first == second and str(data) in first and "cut short" in first and "\n" not in first
    with pytest.raises(UserError, match=rf"{data.name} has \d+ bytes, not"):
        StoredTensors(store.folder / "a")


def _no_file(folder: Path) -> None:
    next(folder.glob("*.distcp")).unlink()


def _bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_file, r"distcp is missing"),
        (lambda folder: _bit(folder / ".metadata"), r"\.metadata is damaged"),
        (lambda folder: (folder / "meta.json").write_text("{"), r"meta\.json is damaged"),
        (shutil.rmtree, "no checkpoint at"),
    ],
)
def test_damage_is_found_on_opening(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    CheckpointStore(tmp_path).save("a", _values(), {})
    damage(tmp_path / "a")
    with pytest.raises(UserError, match=message) as raised:
        StoredTensors(tmp_path / "a")
    assert "\n" not in str(raised.value)


def test_damage_inside_a_file(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save("a", {"w": torch.ones(100, 100)}, {})
    data = next((tmp_path / "a").glob("*.distcp"))
    _bit(data)
    with pytest.raises(UserError, match="SHA-256"):
        StoredTensors(tmp_path / "a", check_hashes=True)
    data.write_bytes(bytes(data.stat().st_size))
    with pytest.raises(UserError, match=rf"{data.name} is damaged at byte 0 \(tensor w\)"):
        StoredTensors(tmp_path / "a").read("w", ((0, 1), (0, 1)))


def test_a_block_of_another_shape_or_kind_is_refused(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for wrong in (torch.zeros(3, 4), torch.zeros(2, 4, dtype=torch.float64)):
        with pytest.raises(UserError, match=r"the block .* of w was made as torch.float"):
            store.save_streamed("a", {"w": ((2, 4), torch.float32)}, lambda *_, wrong=wrong: wrong, {})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="not a name"):
        store.save_streamed("../a", {}, lambda *_: torch.zeros(()), {})


def _die_at(call: int, folder: Path, values: dict[str, Tensor]) -> bool:
    """Saves in a child that kills itself at its ``call``-th block or change of the disk; if it finished."""
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

    for name in ("replace", "rename", "fsync", "write"):
        setattr(os, name, counted(getattr(os, name)))
    try:
        produce = counted(lambda key, bounds: _part(values[key], bounds))
        CheckpointStore(folder).save_streamed("a", _declared(values), produce, {}, block_bytes=2_000_000)
        os._exit(0)
    except BaseException:
        os._exit(1)


def _kill_everywhere(folder: str) -> tuple[int, set[float]]:
    store = CheckpointStore(Path(folder))
    seen = set()
    call = 0
    _save_streamed(store, "a", {"w": torch.zeros(1000, 1000)}, 1 << 20)
    while not _die_at(call, store.folder, {"w": torch.ones(1000, 1000)}):
        loaded = {"w": torch.full((1000, 1000), 5.0)}
        store.verify("a")
        store.load("a", loaded)
        assert len(loaded["w"].unique()) == 1
        seen.add(float(loaded["w"][0, 0]))
        _save_streamed(store, "a", {"w": torch.zeros(1000, 1000)}, 1 << 20)
        assert store.names() == ["a"] and not list(store.folder.glob("*.tmp-*"))
        call += 1
    return call, seen


@pytest.mark.distributed
def test_a_kill_at_any_step_leaves_a_complete_checkpoint(tmp_path: Path) -> None:
    ((steps, seen),) = run_distributed(_kill_everywhere, 1, str(tmp_path))
    assert steps > 10 and seen == {0.0, 1.0}
