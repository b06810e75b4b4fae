"""Tiny streams for tests: real text files, a real configuration, and the real program in processes of its own."""

from __future__ import annotations

import functools
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import yaml

from tests.shared_work import made_once
from tests.stream import program
from tests.zygote import Child, fork

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("program.py")
LONGEST = 100
"""Seconds that a run may take."""
TIMINGS = ("seconds", "tokens_per_second", "mfu")
"""What two runs of the same configuration may differ in."""
COMMUNICATION = "bytes_communicated"
"""What two layouts may differ in besides."""
PORTS = 20
"""How many ports a process has for its runs."""
SYLLABLES = [consonant + vowel for consonant in "bdfgklmn" for vowel in "aeio"]


@dataclass(frozen=True)
class Ended:
    """What a finished process left."""

    code: int
    out: str
    err: str


def documents(domain: int, count: int = 150) -> list[str]:
    """Seeded prose of a domain: its own words, in an order that is its own, too."""
    chosen = random.Random(f"domain {domain}")
    words = ["".join(chosen.choices(SYLLABLES, k=chosen.randint(1, 3))) for _ in range(60)]
    follow = {word: chosen.sample(words, 4) for word in words}
    texts = []
    for _ in range(count):
        word, text = chosen.choice(words), []
        for _ in range(chosen.randint(15, 40)):
            text.append(word)
            word = chosen.choice(follow[word])
        texts.append(" ".join(text) + ".")
    return texts


def write_jsonl(path: Path, texts: Iterable[str]) -> Path:
    """A ``.jsonl`` of documents."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def write_stream(folder: Path, family: str = "gpt", **changes: Any) -> Path:
    """Text and configuration of a stream of three domains with two growths, each recovered from.

    ``changes`` replace or extend sections of the configuration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate("abc"):
        write_jsonl(folder / f"{name}.jsonl", documents(index))
    groups = {"kv_groups": 2} if family == "llama" else {}
    tree: dict[str, Any] = {
        "run": {"dir": str(folder / "run"), "seed": 3, "data": str(folder)},
        "model": {
            "family": family, "layers": 2, "heads": 2, "head_dim": 8, "seq_len": 32, "vocab_multiple": 64, **groups
        },
        "tokenizer": {"vocab_size": 320},
        "memory": {"tokens": 700, "replay": 0.25},
        "optim": {"lr": 3e-3, "warmup": 0.2},
        "batch": {"global": 8, "micro": 4},
        "precision": "fp64",
        "checkpoint": {"every": 3, "keep": 2},
        "eval": {"every": 3, "batches": 2},
        "log": {"every": 1, "tensorboard": False},
        "stream": [
            {"domain": "a", "data": "a.jsonl", "steps": 8},
            {"domain": "b", "data": "b.jsonl", "steps": 8, "grow": {"layers": 3, "heads": 4}, "recover": {"steps": 5}},
            {
                "domain": "c", "data": "c.jsonl", "steps": 7, "grow": {"layers": 4, "heads": 6, "mlp": 200},
                "recover": {"steps": 4},
            },
        ],
    }  # fmt: skip
    for key, value in changes.items():
        tree[key] = tree.get(key, {}) | value if isinstance(value, dict) else value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return path


def command(*arguments: str, ranks: int = 1, strike: str | None = None) -> list[str]:
    """The command line of ``elle-mp pretrain``, under torchrun when there are several ranks."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={free_port()}"]
    program = ["-m", "elle_mp"] if strike is None else [str(PROGRAM), strike]
    return [*launcher, *program, "pretrain", *arguments]


def free_port() -> int:
    """A port that nobody listens on. It is one of a few of this process's own, and below those that the system hands
    out: another test that runs at the same time will not take it before it is used."""
    for port in islice(ports(), PORTS):
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise RuntimeError(f"none of {PORTS} ports is free")


@functools.cache
def ports() -> Iterator[int]:
    """This process's ports, in turn."""
    first = 10_000 + os.getpid() % 1100 * PORTS
    return cycle(range(first, first + PORTS))


def start(arguments: Sequence[str], **streams: Any) -> subprocess.Popen[str]:
    """Starts a program with one thread a process, in a process group of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    return subprocess.Popen(arguments, text=True, env=environment, start_new_session=True, **pipes)


def finish(process: subprocess.Popen[str], timeout: float = LONGEST) -> Ended:
    """Waits for a started program; one that takes too long is ended, and so is what torchrun started."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.communicate(timeout=60)
        raise
    return Ended(process.returncode, out, err)


def run(config: Path, *overrides: str, ranks: int = 1, strike: str | None = None) -> Ended:
    """Runs ``elle-mp pretrain`` to its end, each rank in a process of its own.

    The processes are forked from ones that have imported everything, and find each other through the variables that
    torchrun and srun set. Imports would otherwise be most of the time of these tests.

    Args:
        strike: ``RANK:SIGNAL[+SIGNAL]@PLACE=COUNT``, a signal at an exact place, see ``tests/stream/program.py``.
    """
    return call("pretrain", str(config), *overrides, ranks=ranks, strike=strike)


def call(*given: str, ranks: int = 1, strike: str | None = None) -> Ended:
    """Runs any command of the program as :func:`run` does."""
    return on_ranks(program.run, [strike or "-", *given], ranks)


def on_ranks(function: Callable[..., None], arguments: Any, ranks: int) -> Ended:
    """Calls a function on every rank, in a process of its own that ends as a program does."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    children: list[Child] = []
    with tempfile.TemporaryDirectory() as folder:
        printed = [[Path(folder, f"{name}-{rank}") for name in ("out", "err")] for rank in range(ranks)]
        try:
            for rank, paths in enumerate(printed):
                place = address | {"RANK": rank, "LOCAL_RANK": rank} if ranks > 1 else {}
                environment = {"PYTHONPATH": str(ROOT)} | {key: str(value) for key, value in place.items()}
                with paths[0].open("wb") as out, paths[1].open("wb") as err:
                    children.append(
                        fork(
                            function, arguments,
                            out=out.fileno(), err=err.fileno(), environment=environment, seconds=LONGEST,
                        )
                    )  # fmt: skip
            codes = [child.wait() for child in children]
        finally:
            for child in children:
                child.kill()
        out, *_ = (paths[0].read_text() for paths in printed)
        return Ended(max(codes, key=abs), out, "".join(paths[1].read_text() for paths in printed))


def succeed(config: Path, *overrides: str, ranks: int = 1, strike: str | None = None) -> Ended:
    """Runs the program, which must end well."""
    ended = run(config, *overrides, ranks=ranks, strike=strike)
    assert ended.code == 0, ended.err
    return ended


@functools.cache
def reference(family: str, **changes: Any) -> Path:
    """The run directory of an uninterrupted run in one process, made once for all tests; its text lies beside it.

    ``changes`` are keys of the top level, their values plain. bert has dropout, so that one family shows that masks do
    not depend on the layout.
    """
    extra: dict[str, Any] = {"model": {"dropout": 0.1}} if family == "bert" else {}
    name = "-".join((family, *(f"{key}={value}" for key, value in changes.items())))
    return made_once(name, lambda folder: succeed(write_stream(folder, family, **extra, **changes))) / "run"


def config_of(run_dir: Path) -> Path:
    """The configuration behind a reference."""
    return run_dir.with_name("config.yaml")


def lines(run_dir: Path, name: str) -> list[dict[str, Any]]:
    """``metrics`` or ``evals`` of a run."""
    return [json.loads(line) for line in (run_dir / f"{name}.jsonl").read_text().splitlines()]


def results(run_dir: Path) -> dict[str, Any]:
    """``results.json`` of a run."""
    return json.loads((run_dir / "results.json").read_text())


def without(value: Any, left_out: Sequence[str]) -> Any:
    """A JSON value without some keys, at any depth."""
    if isinstance(value, dict):
        return {key: without(item, left_out) for key, item in value.items() if key not in left_out}
    return [without(item, left_out) for item in value] if isinstance(value, list) else value


def record(run_dir: Path, left_out: Sequence[str] = TIMINGS) -> dict[str, Any]:
    """Everything that a run measured, times apart."""
    whole = {"metrics": lines(run_dir, "metrics"), "evals": lines(run_dir, "evals"), "results": results(run_dir)}
    return without(whole, left_out)


def differences(one: Any, other: Any, tolerance: float, place: str = "") -> list[str]:
    """Where two JSON values differ: numbers by more than ``tolerance`` relative, anything else at all."""
    if isinstance(one, dict) and isinstance(other, dict) and list(one) == list(other):
        return [text for key in one for text in differences(one[key], other[key], tolerance, f"{place}.{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [text for index, (a, b) in pairs for text in differences(a, b, tolerance, f"{place}.{index}")]
    if isinstance(one, float) and isinstance(other, float):
        if abs(one - other) <= tolerance * max(abs(one), abs(other)):
            return []
    elif one == other:
        return []
    return [f"{place}: {one!r} and {other!r}"]
