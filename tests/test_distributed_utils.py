"""The process pool of the tests themselves: results by rank, reuse, errors, deaths and hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from tests.distributed_utils import RankError, run_distributed


def _rank_and_pid(scale: int) -> tuple[int, int]:
    total = torch.tensor([dist.get_rank() * scale])
    dist.all_reduce(total)
    return int(total), os.getpid()


def _matmul_over_a_mesh(groups_before: int) -> torch.Tensor:
    for _ in range(groups_before):  # so that the mesh's groups get other names than in the call before
        dist.new_group([0, 1, 2, 3])
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    x = torch.arange(48, dtype=torch.float64).reshape(8, 6)
    w = torch.arange(24, dtype=torch.float64).reshape(6, 4)
    product = distribute_tensor(x, mesh, [Shard(0), Replicate()]) @ distribute_tensor(w, mesh, [Replicate(), Shard(1)])
    return product.redistribute(mesh, [Replicate(), Shard(0)]).full_tensor()


def _raise_on_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("the culprit")
    dist.barrier()


def _die_on_one() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), 9)
    dist.barrier()


def _hang_on_one() -> None:
    if dist.get_rank() == 1:
        time.sleep(1000)
    dist.barrier()


def _leave_a_mess(folder: str) -> None:
    os.environ["LEFT"] = "behind"
    os.chdir(folder)
    torch.set_default_dtype(torch.float64)


def _state() -> tuple[str, bool, torch.dtype]:
    return os.getcwd(), "LEFT" in os.environ, torch.get_default_dtype()


def test_results_come_by_rank_and_processes_are_new() -> None:
    first = run_distributed(_rank_and_pid, 2, 5)
    second = run_distributed(_rank_and_pid, 2, 7)
    assert [total for total, _ in first] == [5, 5] and [total for total, _ in second] == [7, 7]
    assert not {pid for _, pid in first} & {pid for _, pid in second}


def test_a_mesh_of_the_next_call_is_not_the_dead_one() -> None:
    expected = torch.arange(48, dtype=torch.float64).reshape(8, 6) @ torch.arange(24, dtype=torch.float64).reshape(6, 4)
    for groups_before in (0, 3, 1):
        for result in run_distributed(_matmul_over_a_mesh, 4, groups_before):
            assert torch.equal(result, expected)


def test_errors_deaths_and_hangs_name_the_rank() -> None:
    with pytest.raises(RankError, match="ValueError: the culprit") as raised:
        run_distributed(_raise_on_one, 2)
    assert raised.value.rank == 1
    with pytest.raises(RankError, match="exit code -9") as raised:
        run_distributed(_die_on_one, 2)
    assert raised.value.rank == 1
    with pytest.raises(RankError, match="_hang_on_one"):
        run_distributed(_hang_on_one, 2, timeout=3.0)
    assert [total for total, _ in run_distributed(_rank_and_pid, 2, 1)] == [1, 1]


def test_what_a_call_left_behind_is_gone(tmp_path: Path) -> None:
    run_distributed(_leave_a_mess, 2, str(tmp_path))
    assert run_distributed(_state, 2) == [(os.getcwd(), False, torch.float32)] * 2


STAYING = """
import os, pathlib, time

def stay(folder):
    pathlib.Path(folder, os.environ["RANK"]).write_text(str(os.getpid()))
    time.sleep(1000)
"""


def test_nothing_outlives_the_process_that_called(tmp_path: Path) -> None:
    """The caller, in a process of its own, is killed while two ranks run."""
    (tmp_path / "staying.py").write_text(STAYING)
    call = f"run_distributed(staying.stay, 2, {str(tmp_path)!r})"
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import staying"
    code += f"; from tests.distributed_utils import run_distributed; {call}"
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1])
    told = [tmp_path / "0", tmp_path / "1"]
    try:
        wait_for(lambda: all(path.exists() and path.read_text() for path in told), 120)
    finally:
        caller.send_signal(signal.SIGKILL)
        caller.wait()
    wait_for(lambda: not any(Path("/proc", path.read_text()).exists() for path in told), 20)


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
