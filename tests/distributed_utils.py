"""Runs a test function on several real processes that talk over gloo.

``run_distributed(fn, world_size, *args)`` is the whole interface. The processes are started once and reused
by every later call (importing torch costs seconds), each call in a process group of its own. A process that
failed, hung or died is never reused. Tests import this file as ``tests.distributed_utils``.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import gc
import importlib
import importlib.util
import inspect
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

START_S = 120.0  # how long a process may take to import torch
GRACE_S = 1.0  # how long the other ranks may still report after the first one failed


class RankError(Exception):
    """A rank failed, died or hung. The message holds its traceback or, for a hang, every rank's stack."""

    def __init__(self, rank: int, text: str) -> None:
        super().__init__(f"rank {rank}: {text}")
        self.rank = rank


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Calls ``fn(*args)`` on ``world_size`` processes in a gloo group; returns each rank's result.

    ``fn`` must be a function at the top level of its module; ``args`` and the results must be picklable.
    Inside, ``torch.distributed`` is initialised and RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE are
    set, one thread each. Afterwards the process group, the working directory, the environment, the default
    dtype and DTensor's caches are put back.

    Raises:
        RankError: a rank raised (its traceback is the message), died, or did not return in ``timeout`` s.
    """
    if fn.__module__ == "__main__":  # every process would run the script, which would start processes
        raise ValueError(f"{fn.__qualname__} has to be in a module, not in the script itself")
    return _pool().run(fn, world_size, args, timeout)


class _Worker:
    """One process, its pipe, and the file that holds what it printed."""

    def __init__(self) -> None:
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the process)
        self.shown = 0
        self.ready = False
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(theirs_in), str(theirs_out)],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.results = Connection(ours_in, writable=False)
        self.calls = Connection(ours_out, readable=False)

    def output(self) -> str:
        """What it printed since the last time this was asked."""
        data = os.pread(self.log.fileno(), 1 << 20, self.shown)
        self.shown += len(data)
        return data.decode(errors="replace")

    def wait_until_ready(self, rank: int) -> None:
        """Waits for its imports, so that no call's time limit has to allow for them."""
        if not self.ready:
            with contextlib.suppress(EOFError):  # it died
                self.ready = self.results.poll(START_S) and bool(self.results.recv_bytes())
            if not self.ready:
                raise RankError(rank, f"did not start in {START_S:g} s\n{self.output()}")

    def kill(self) -> None:
        """Ends it and everything that it started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            self.process.kill()
        self.process.wait()
        self.results.close()
        self.calls.close()


class _Pool:
    """Workers that wait for a call; rank r of a call is worker r."""

    def __init__(self) -> None:
        self.workers: list[_Worker] = []
        atexit.register(self.close)

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
        self.workers = []

    def run(self, fn: Callable[..., Any], world_size: int, args: tuple[Any, ...], timeout: float) -> list[Any]:
        dead = [worker for worker in self.workers if worker.process.poll() is not None]
        for worker in dead:
            self._discard(worker)
        while len(self.workers) < world_size:
            self.workers.append(_Worker())
        workers = self.workers[:world_size]
        finished = False
        try:
            for rank, worker in enumerate(workers):
                worker.wait_until_ready(rank)
            with tempfile.TemporaryDirectory(prefix="rendezvous-") as folder:
                where = (fn.__module__, inspect.getfile(fn), list(sys.path))
                body = pickle.dumps((fn.__qualname__, args))
                for rank, worker in enumerate(workers):
                    worker.output()
                    call = (where, body, os.getcwd(), f"{folder}/store", rank, world_size, timeout)
                    worker.calls.send_bytes(pickle.dumps(call))
                results = self._collect(workers, timeout)
                finished = True
                return results
        finally:
            for rank, worker in enumerate(workers):
                if text := worker.output():
                    print(f"--- rank {rank} printed:\n{text}", end="", file=sys.stderr)
                if not finished:
                    self._discard(worker)

    def _collect(self, workers: list[_Worker], timeout: float) -> list[Any]:
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
            raise RankError(min(waiting), f"no result after {timeout:g} s\n{self._stacks(waiting)}")
        return [results[rank] for rank in range(len(workers))]

    def _stacks(self, waiting: dict[int, _Worker]) -> str:
        for worker in waiting.values():
            os.kill(worker.process.pid, signal.SIGUSR1)  # faulthandler prints the stack of every thread
        time.sleep(0.2)
        texts = {rank: worker.output() for rank, worker in waiting.items()}
        deadline = time.monotonic() + 5.0
        while not all(texts.values()) and time.monotonic() < deadline:  # on a busy machine it takes its time
            time.sleep(0.2)
            texts = {rank: text + waiting[rank].output() for rank, text in texts.items()}
        return "\n".join(f"rank {rank} is at:\n{text}" for rank, text in texts.items())

    def _discard(self, worker: _Worker) -> None:
        worker.kill()
        self.workers.remove(worker)


@functools.cache
def _pool() -> _Pool:
    return _Pool()


def _module_of(name: str, file: str) -> Any:
    """The test's module under the name that pickle knows it by, whatever way pytest imported it."""
    try:
        module = importlib.import_module(name)
        if Path(module.__file__ or "").resolve() == Path(file).resolve():
            return module
    except ImportError:
        pass  # pytest's importlib mode: not importable by name, so load the file itself
    specification = importlib.util.spec_from_file_location(name, file)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module


class _Caches:
    """torch's caches that refer to process groups, and the garbage of a call.

    Nearly all objects of a worker are what imports made. They are looked through once, not after every call, which
    would cost most of a second each time.
    """

    def __init__(self) -> None:
        self.found: list[Any] = []
        self.modules = 0

    def clear(self) -> None:
        """Empties the caches, those of modules that the last call imported included, and collects garbage."""
        import torch
        from torch.distributed.tensor import _redistribute

        imported = len(sys.modules) != self.modules
        if imported:
            for thing in gc.get_objects():
                is_cache = type(thing) is functools._lru_cache_wrapper
                if is_cache and str(getattr(thing, "__module__", "")).startswith("torch.distributed"):
                    self.found.append(thing)
        for cache in self.found:
            cache.cache_clear()
        # What not every torch has. The planners hold meshes, their groups, and three threads of each group.
        for clear in (
            getattr(torch._C, "_clear_DTensor_sharding_propagator_cache", None),
            getattr(_redistribute, "clear_redistribute_planner_cache", None),
        ):
            if clear is not None:
                clear()
        gc.collect()
        if imported:
            gc.freeze()  # what is left belongs to the modules
            self.modules = len(sys.modules)


def _forget_process_groups(caches: _Caches) -> None:
    """Destroys the groups and every cache that still refers to one: DTensor keeps placements together with
    their mesh, and a mesh of the next call compares equal to a dead one."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    caches.clear()


def _serve_one(call: tuple[Any, ...]) -> Any:
    import torch
    import torch.distributed as dist

    (name, file, path), body, folder, store, rank, world_size, _ = call
    sys.path[:] = path
    os.chdir(folder)
    for key in ("RANK", "LOCAL_RANK"):
        os.environ[key] = str(rank)
    for key in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ[key] = str(world_size)
    module = _module_of(name, file)
    qualname, args = pickle.loads(body)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    result = pickle.dumps((True, getattr(module, qualname)(*args)))
    if dist.is_initialized():
        dist.barrier()  # nobody tears its connections down while another still uses them
    return result


def _serve() -> None:
    """The life of a worker: calls until the pipe closes. One that failed is not used again."""
    calls = Connection(int(sys.argv[1]), writable=False)
    results = Connection(int(sys.argv[2]), readable=False)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    import torch
    import torch.distributed.tensor  # most tests need it: load it while the pool starts

    torch.set_num_threads(1)
    environment, caches = dict(os.environ), _Caches()
    caches.clear()
    results.send_bytes(b"ready")
    while True:
        try:
            call = pickle.loads(calls.recv_bytes())
        except EOFError:
            os._exit(0)
        faulthandler.dump_traceback_later(call[-1] + 60, exit=True)  # outlives nobody, should the parent be killed
        try:
            results.send_bytes(_serve_one(call))
        except BaseException:
            results.send_bytes(pickle.dumps((False, traceback.format_exc())))
            signal.pause()  # alive, so that no peer fails first with "connection closed"; the pool ends us
        faulthandler.cancel_dump_traceback_later()
        _forget_process_groups(caches)
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(1)
        os.environ.clear()
        os.environ.update(environment)
        sys.stdout.flush()


if __name__ == "__main__":
    del sys.path[0]  # this folder holds folders named after packages
    _serve()
