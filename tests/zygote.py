"""A process that has imported everything and forks for every call: each test's processes are new, and start at once.

``fork(fn, ...)`` is the whole interface. Imports would otherwise be most of the time of the tests that need several
processes; and whatever a call leaves behind (process groups and their threads, caches, patches) ends with its process.
The zygote itself computes nothing: it has one thread, so that what it forks is whole.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import importlib.util
import inspect
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

COMMAND = ("torch._dynamo", "elle_mp.stream.grow_command", "elle_mp.stream.run")
"""What ``elle-mp`` imports when it starts to train or to grow."""
ENGINES = ("pytest", "torch.distributed.tensor", "torch.distributed.pipelining", "elle_mp.train.engine", "deepspeed")
"""What most test functions need besides; without DeepSpeed where it is not installed."""
MOST_FILES = 8
STARTING = threading.Lock()


class Child:
    """A forked process, which leads a group of its own."""

    def __init__(self, zygote: _Zygote, pid: int) -> None:
        self.pid = pid
        self._zygote = zygote
        self._ended = os.pidfd_open(pid)
        self._code: int | None = None

    def wait(self) -> int:
        """Its exit code, when it has ended; minus the number of a signal that ended it."""
        if self._code is None:
            select.select([self._ended], [], [])
            os.close(self._ended)
            self._code = self._zygote.ask(self.pid)
        return self._code

    def kill(self) -> None:
        """Ends it and everything that it started."""
        if self._code is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self.wait()


@dataclass(frozen=True)
class _Call:
    """What a forked process does: ``arguments`` are pickled, and it has files of its own, the first two to print to."""

    module: str
    file: str
    function: str
    arguments: bytes
    path: list[str]
    folder: str
    environment: dict[str, str]
    seconds: int

    def __call__(self, files: Sequence[int]) -> None:
        signal.alarm(self.seconds)
        for file, stream in zip(files[:2], (1, 2), strict=True):
            os.dup2(file, stream)
        os.environ.clear()
        os.environ.update(self.environment)
        sys.path[:] = self.path
        os.chdir(self.folder)
        getattr(module_of(self.module, self.file), self.function)(*files[2:], *pickle.loads(self.arguments))


def fork(
    fn: Callable[..., None],
    *arguments: Any,
    out: int,
    err: int,
    files: Sequence[int] = (),
    environment: Mapping[str, str],
    seconds: float,
    engines: bool = False,
) -> Child:
    """Calls ``fn(*files, *arguments)`` in a new process, which then ends as every program does.

    Args:
        fn: at the top level of a module, which the new process imports.
        arguments: picklable.
        out, err: what the process prints to.
        files: to be handed on open.
        environment: what the process has besides this one's; one thread, and gloo on this machine alone, go without
            saying.
        seconds: after which it is ended by SIGALRM.
        engines: begin with all that trains instead of what the command imports.
    """
    usual = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    call = _Call(
        fn.__module__, inspect.getfile(fn), fn.__qualname__, pickle.dumps(arguments),
        list(sys.path), os.getcwd(), {**os.environ, **usual, **environment}, int(seconds),
    )  # fmt: skip
    with STARTING:
        zygote = _zygote(engines)
    return Child(zygote, zygote.ask(call, [out, err, *files]))


class _Zygote:
    """This process's end of the line to a zygote."""

    def __init__(self, line: socket.socket) -> None:
        self.line = line
        self.words = Connection(os.dup(line.fileno()))
        self.lock = threading.Lock()  # some tests run several programs at once

    def ask(self, what: Any, files: Sequence[int] = ()) -> int:
        """Sends a call, or names of modules for another zygote, and gets a process; or sends a process that has ended,
        and gets its exit code."""
        with self.lock:
            socket.send_fds(self.line, [b"."], list(files))
            self.words.send_bytes(pickle.dumps(what))
            return int(pickle.loads(self.words.recv_bytes()))

    def close(self) -> None:
        """Ends it and all that it has forked."""
        self.line.close()
        self.words.close()


@functools.cache
def _zygote(engines: bool) -> _Zygote:
    """A zygote, started when it is first needed; the one with engines is forked from the other."""
    ours, theirs = socket.socketpair()
    with theirs:
        if engines:
            _zygote(False).ask(ENGINES, [theirs.fileno()])
        else:
            root = str(Path(__file__).parents[1])
            code = f"import sys; sys.path[0] = {root!r}; from tests.zygote import main; main({theirs.fileno()})"
            environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            process = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
            atexit.register(process.wait)
    zygote = _Zygote(ours)
    atexit.register(zygote.close)
    return zygote


def module_of(name: str, file: str) -> Any:
    """The function's module under the name that pickle knows it by, whatever way pytest imported it."""
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


def _import(names: Sequence[str]) -> None:
    """Imports modules, and sets what was imported apart from what later calls have to look through for garbage."""
    for name in names:
        if name != "deepspeed":
            importlib.import_module(name)
        elif importlib.util.find_spec(name) is not None:
            importlib.import_module("elle_mp.parallel.deepspeed").load_deepspeed()
    gc.collect()
    gc.freeze()
    threads = os.listdir("/proc/self/task")
    if len(threads) > 1:
        raise RuntimeError(f"a zygote has {len(threads)} threads: what it forks may hang")


def _serve(line: int, modules: Sequence[str]) -> tuple[Any, list[int]] | None:
    """Serves until the line closes. In a forked process, returns what that one has to do, and its files."""
    _import(modules)
    children: set[int] = set()
    with socket.socket(fileno=line) as calls, Connection(os.dup(line)) as words:
        while True:
            begins, files, *_ = socket.recv_fds(calls, 1, MOST_FILES)
            if not begins:
                for child in children:
                    os.killpg(child, signal.SIGKILL)
                return None
            what = pickle.loads(words.recv_bytes())
            if isinstance(what, int):
                answer = os.waitstatus_to_exitcode(os.waitpid(what, 0)[1])
                children.discard(what)
            else:
                answer = os.fork()
                with contextlib.suppress(OSError):  # both do it, so that it is done for both
                    os.setpgid(answer, answer)
                if answer == 0:
                    return what, files
                if isinstance(what, _Call):  # another zygote has a line of its own
                    children.add(answer)
                for file in files:
                    os.close(file)
            words.send_bytes(pickle.dumps(answer))


def main(line: int) -> None:
    """The life of a zygote, and of what it forks."""
    modules = COMMAND
    while (job := _serve(line, modules)) is not None:
        what, files = job
        if isinstance(what, _Call):
            what(files)
            return
        (line,), modules = files, what
