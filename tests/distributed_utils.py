"""Runs a test function on several real processes that talk over gloo.

``run_distributed(fn, world_size, *args)`` is the whole interface. Each call has processes of its own, forked from one
that has imported everything (``tests/zygote.py``). Tests import this file as ``tests.distributed_utils``.
"""

from __future__ import annotations

import faulthandler
import inspect
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from tests.zygote import fork, module_of

GRACE_S = 1.0  # how long the other ranks may still report after the first one failed


class RankError(Exception):
    """A rank failed, died or hung. The message holds its traceback or, for a hang, every rank's stack."""

    def __init__(self, rank: int, text: str) -> None:
        super().__init__(f"rank {rank}: {text}")
        self.rank = rank


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Calls ``fn(*args)`` on ``world_size`` new processes in a gloo group; returns each rank's result.

    ``fn`` must be a function at the top level of its module; ``args`` and the results must be picklable.
    Inside, ``torch.distributed`` is initialised and RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE are
    set, one thread each.

    Raises:
        RankError: a rank raised (its traceback is the message), died, or did not return in ``timeout`` s.
    """
    body = pickle.dumps((fn.__module__, inspect.getfile(fn), fn.__qualname__, pickle.dumps(args)))
    workers: list[_Worker] = []
    with tempfile.TemporaryDirectory(prefix="rendezvous-") as folder:
        try:
            for rank in range(world_size):
                workers.append(_Worker(body, f"{folder}/store", rank, world_size, timeout))
            return _collect(workers, timeout)
        finally:
            for rank, worker in enumerate(workers):
                worker.process.kill()
                if text := worker.output():
                    print(f"--- rank {rank} printed:\n{text}", end="", file=sys.stderr)
                worker.results.close()


class _Worker:
    """One process, the pipe of its result, and the file that holds what it printed."""

    def __init__(self, body: bytes, store: str, rank: int, world_size: int, timeout: float) -> None:
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the process)
        self.shown = 0
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        ours, theirs = os.pipe()
        self.results = Connection(ours, writable=False)
        try:
            self.process = fork(
                _work, body, store, rank, world_size,
                out=self.log.fileno(), err=self.log.fileno(), files=[theirs],
                environment={key: str(value) for key, value in place.items()},
                seconds=timeout + 60, engines=True,
            )  # fmt: skip
        finally:
            os.close(theirs)

    def output(self) -> str:
        """What it printed since the last time this was asked."""
        data = os.pread(self.log.fileno(), 1 << 20, self.shown)
        self.shown += len(data)
        return data.decode(errors="replace")


def _collect(workers: list[_Worker], timeout: float) -> list[Any]:
    """Waits for every rank. The one that failed first is the culprit; one that died counts before one
    that raised, since its peers only see a broken connection."""
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    raised: dict[int, str] = {}
    died: list[int] = []
    waiting = dict(enumerate(workers))
    while waiting:
        rank_of = {worker.results: rank for rank, worker in waiting.items()}
        ready = wait(list(rank_of), max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for connection in ready:
            rank = rank_of[connection]  # type: ignore[index]
            del waiting[rank]
            try:
                ok, value = pickle.loads(workers[rank].results.recv_bytes())
            except EOFError:
                died.append(rank)
                continue
            (results if ok else raised)[rank] = value
        if died or raised:
            deadline = min(deadline, time.monotonic() + GRACE_S)
    if died:
        code = workers[died[0]].process.wait()
        raise RankError(died[0], f"the process died with exit code {code}\n{workers[died[0]].output()}")
    if raised:
        rank, text = next(iter(raised.items()))
        raise RankError(rank, f"raised\n{text}")
    if waiting:
        raise RankError(min(waiting), f"no result after {timeout:g} s\n{_stacks(waiting)}")
    return [results[rank] for rank in range(len(workers))]


def _stacks(waiting: dict[int, _Worker]) -> str:
    for worker in waiting.values():
        os.kill(worker.process.pid, signal.SIGUSR1)  # faulthandler prints the stack of every thread
    time.sleep(0.2)
    texts = {rank: worker.output() for rank, worker in waiting.items()}
    deadline = time.monotonic() + 5.0
    while not all(texts.values()) and time.monotonic() < deadline:  # on a busy machine it takes its time
        time.sleep(0.2)
        texts = {rank: text + waiting[rank].output() for rank, text in texts.items()}
    return "\n".join(f"rank {rank} is at:\n{text}" for rank, text in texts.items())


def _work(results: int, body: bytes, store: str, rank: int, world_size: int) -> None:
    """The life of a rank. One that failed stays, so that no peer fails first with "connection closed"."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    pipe = Connection(results, readable=False)
    try:
        result = _result(body, store, rank, world_size)
        sys.stdout.flush()
        pipe.send_bytes(result)
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
        signal.pause()
    os._exit(0)


def _result(body: bytes, store: str, rank: int, world_size: int) -> bytes:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    module, file, qualname, arguments = pickle.loads(body)
    call = getattr(module_of(module, file), qualname)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    result = pickle.dumps((True, call(*pickle.loads(arguments))))
    if dist.is_initialized():
        dist.barrier()  # nobody tears its connections down while another still uses them
    return result
