"""A checkpoint is complete or not there: kills, full disks, damage, retention."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from elle_mp.checkpoint.store import CheckpointStore
from elle_mp.errors import UserError
from tests.distributed_utils import run_distributed


def _tensors(value: float, size: int = 50) -> dict[str, Tensor]:
    return {"weight": torch.full((size, size), value), "step": torch.tensor(value)}


def _value_in(store: CheckpointStore, name: str) -> float:
    tensors = _tensors(-1.0)
    store.load(name, tensors)
    assert torch.equal(tensors["weight"], torch.full((50, 50), float(tensors["step"])))
    return float(tensors["step"])


def _data_file(folder: Path) -> Path:
    return max(folder.iterdir(), key=lambda path: path.stat().st_size)


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    assert store.latest() is None and store.names() == []
    meta = {"stage": 1, "domains": ["docs", "code"], "nested": {"lr": 1e-3, "none": None}}
    store.save("stage1-200", _tensors(1.0), meta)
    store.save("stage1-100", _tensors(2.0), {})
    assert store.names() == ["stage1-200", "stage1-100"]  # by age, not by name
    assert store.latest() == "stage1-100"
    assert store.meta("stage1-200") == meta
    assert _value_in(store, "stage1-200") == 1.0 and _value_in(store, "stage1-100") == 2.0
    again = CheckpointStore(store.folder)
    again.save("stage1-200", _tensors(3.0), {"again": True})
    assert again.names() == ["stage1-100", "stage1-200"] and _value_in(again, "stage1-200") == 3.0
    assert sorted(path.name for path in store.folder.iterdir()) == ["latest", "stage1-100", "stage1-200"]


def test_parameters_are_filled_in_place(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    layer = torch.nn.Linear(4, 3)
    store.save("a", dict(layer.named_parameters()), {})
    saved = layer.weight.detach().clone()
    pointer = layer.weight.data_ptr()
    with torch.no_grad():
        layer.weight.zero_()
    store.load("a", dict(layer.named_parameters()))
    assert torch.equal(layer.weight, saved) and layer.weight.data_ptr() == pointer and layer.weight.requires_grad


def test_a_part_can_be_read_alone(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save("a", _tensors(3.0), {})
    step = torch.zeros(())
    with pytest.raises(UserError, match=r"this model has no tensor weight \[50, 50\]"):
        store.load("a", {"step": step})
    store.load("a", {"step": step}, partial=True)
    assert step == 3.0
    with pytest.raises(UserError, match="it holds no tensor other"):
        store.load("a", {"other": step}, partial=True)


def test_meta_must_be_json_and_names_plain(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    with pytest.raises(TypeError):
        store.save("a", _tensors(1.0), {"path": tmp_path})
    for name in ("", "a/b", "..", "latest", "a.tmp-1", ".hidden"):
        with pytest.raises(ValueError, match="not a name"):
            store.save(name, _tensors(1.0), {})
    assert not store.folder.exists()


def test_the_newest_stay(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for number in range(6):
        store.save(f"s{number}", _tensors(number), {}, permanent=number in (0, 3))
    assert store.prune(2) == ["s1", "s2"]
    assert store.names() == ["s0", "s3", "s4", "s5"]
    assert store.prune(2) == []
    assert store.prune(0) == ["s4"]  # never the latest
    assert {path.name for path in tmp_path.iterdir()} == {"s0", "s3", "s5", "latest"}


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: list[tuple[str, Callable[[Path], Any], str]] = [
    ("data", _truncate, "bytes, not"),
    ("data", Path.unlink, "is missing"),
    ("data", _flip_a_bit, "SHA-256"),
    (".metadata", _flip_a_bit, "SHA-256"),
    ("meta.json", _truncate, "meta.json is damaged"),
    ("meta.json", Path.unlink, "is missing"),
]


@pytest.mark.parametrize(("file", "damage", "message"), DAMAGES, ids=lambda item: getattr(item, "__name__", str(item)))
def test_damage_is_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, damage: Callable[[Path], Any], message: str
) -> None:
    store = CheckpointStore(tmp_path)
    store.save("old", _tensors(1.0), {})
    store.save("new", _tensors(2.0), {})
    damage(_data_file(tmp_path / "new") if file == "data" else tmp_path / "new" / file)
    if file == "meta.json" and damage is _truncate:  # the last byte is a line feed: take the brace as well
        damage(tmp_path / "new" / file)
    with pytest.raises(UserError, match=message) as raised:
        store.verify("new")
    assert "\n" not in str(raised.value)
    tensors = _tensors(-1.0)
    with pytest.raises(UserError, match=message):
        store.load("new", tensors)
    assert torch.equal(tensors["weight"], _tensors(-1.0)["weight"])
    with caplog.at_level(logging.WARNING):
        latest = store.latest()
    if damage is _flip_a_bit:  # found by hash only, when it is loaded
        assert latest == "new"
    else:
        assert latest == "old" and "new is missing or damaged" in caplog.text
        assert _value_in(store, "old") == 1.0


def test_latest_survives_the_loss_of_its_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(tmp_path)
    store.save("a", _tensors(1.0), {})
    (tmp_path / "latest").unlink()
    assert store.latest() == "a" and "latest is missing" in caplog.text
    shutil.rmtree(tmp_path / "a")
    caplog.clear()
    (tmp_path / "latest").write_text("a\n")
    assert store.latest() is None and "there is no other" in caplog.text


def test_a_newer_format_is_not_taken_for_nothing(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save("a", _tensors(1.0), {})
    manifest = json.loads((tmp_path / "a" / "meta.json").read_text())
    (tmp_path / "a" / "meta.json").write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(UserError, match="format 2; this elle_mp reads format 1"):
        store.latest()


def _die_at(call: int, folder: Path, name: str, value: float) -> bool:
    """Saves in a child that kills itself before its ``call``-th change of the disk; if it finished."""
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

    for module, names in (
        (os, ("replace", "rename", "mkdir", "fsync", "unlink", "rmdir")),
        (shutil, ("rmtree",)),
    ):
        for function in names:
            setattr(module, function, counted(getattr(module, function)))
    try:
        CheckpointStore(folder).save(name, _tensors(value), {"value": value})
        os._exit(0)
    except BaseException:
        os._exit(1)


def _kill_everywhere(folder: str, name: str) -> tuple[int, set[float]]:
    """Kills a save at each step in turn and checks what is left; returns the steps and the values seen."""
    store = CheckpointStore(Path(folder))
    store.save("old", _tensors(1.0), {"value": 1.0})
    seen = set()
    call = 0
    while not _die_at(call, store.folder, name, 2.0):
        latest = store.latest()
        assert latest is not None
        value = store.meta(latest)["value"]
        assert _value_in(store, latest) == value
        for complete in store.names():
            store.verify(complete)
        seen.add(value)
        call += 1
        store.save("old", _tensors(1.0), {"value": 1.0})  # works on what is left, and clears it away
        assert store.latest() == "old"
        assert not list(store.folder.glob("*.tmp-*"))
    assert _value_in(store, name) == 2.0 and store.latest() == name
    return call, seen


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["new", "old"])
def test_a_kill_at_any_step_leaves_a_complete_latest(tmp_path: Path, name: str) -> None:
    ((steps, seen),) = run_distributed(_kill_everywhere, 1, str(tmp_path), name)
    assert steps > 8
    assert seen == {1.0, 2.0}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a small file system here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def _fill(folder: str) -> list[str]:
    store = CheckpointStore(Path(folder))
    store.save("small", _tensors(1.0), {})
    messages = []
    with pytest.raises(UserError) as raised:
        store.save("big", _tensors(2.0, size=2000), {})
    messages.append(str(raised.value))
    assert store.latest() == "small" and _value_in(store, "small") == 1.0
    return messages


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_full_disk_costs_nothing(small_disk: Path, world_size: int) -> None:
    results = run_distributed(_fill, world_size, str(small_disk / "checkpoints"))
    assert all(messages == results[0] for messages in results)
    assert "No space left on device" in results[0][0] and "\n" not in results[0][0]
    assert {path.name for path in (small_disk / "checkpoints").iterdir()} == {"small", "latest"}


def _write(folder: str) -> str:
    with pytest.raises(UserError) as raised:
        CheckpointStore(Path(folder)).save("next", _tensors(2.0), {})
    return str(raised.value)


@pytest.mark.distributed
def test_a_read_only_folder_is_one_line_on_every_rank(small_disk: Path) -> None:
    store = CheckpointStore(small_disk / "checkpoints")
    store.save("small", _tensors(1.0), {})
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    first, second = run_distributed(_write, 2, str(store.folder))
    assert first == second and "Read-only file system" in first and "\n" not in first
    assert store.latest() == "small" and _value_in(store, "small") == 1.0


@pytest.mark.distributed
def test_a_folder_that_cannot_be_made_is_one_line_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    first, second = run_distributed(_write, 2, str(tmp_path / "file" / "checkpoints"))
    assert first == second and "Not a directory" in first and "\n" not in first


def _write_with_one_rank_cut_off(folder: str) -> str:
    """Rank 1 alone cannot write (its part of the disk fails); the others must not wait for it."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    tensors = {"w": distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)])}
    store = CheckpointStore(Path(folder))
    store.save("good", tensors, {})
    if dist.get_rank() == 1:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(UserError) as raised:
            store.save("bad", tensors, {})
    finally:
        if dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    assert store.names() == ["good"] and store.latest() == "good"
    return str(raised.value)


@pytest.mark.distributed
def test_one_rank_that_cannot_write_stops_all(tmp_path: Path) -> None:
    first, second = run_distributed(_write_with_one_rank_cut_off, 2, str(tmp_path))
    assert first == second and "File too large" in first
    assert {path.name for path in tmp_path.iterdir()} == {"good", "latest"}
