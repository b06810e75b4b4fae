"""What holds for every test: one thread per process, no network, the same seeds, several at a time, slow ones first."""

from __future__ import annotations

import gc
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from tests.shared_work import FOLDER

# Read when torch is first imported, by this process and by those that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

MOST_WORKERS = 4
"""Each may have ten processes besides itself, of some 100 MB that they do not share."""


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """How many processes run tests: for the whole suite one more than there are cores, since ranks wait for one another
    and tests for timers; none besides this one for a part of it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    whole = config.args == config.getini("testpaths") and not config.option.keyword
    return min(cores + 1, MOST_WORKERS) if whole and cores > 1 else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Deals the slow tests out to the heads of the workers' shares: at the end only short ones are left to steal."""
    slow = [item for item in items if item.get_closest_marker("slow")]
    short = [item for item in items if not item.get_closest_marker("slow")]
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    ends = [len(items) * (worker + 1) // workers for worker in range(workers)]
    items.clear()
    for worker, end in enumerate(ends):
        items += slow[worker::workers]
        share = max(0, end - len(items))
        items += short[:share]
        del short[:share]
    items += short


def pytest_configure(config: pytest.Config) -> None:
    """Makes the folder of what tests share; workers of xdist find its name in their environment."""
    if not hasattr(config, "workerinput"):
        os.environ[FOLDER] = tempfile.mkdtemp(prefix="elle-tests-")


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(Path(os.environ.pop(FOLDER)), ignore_errors=True)


def pytest_collection_finish() -> None:
    """What was imported stays: no collection of garbage need look through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same generator states, whichever tests ran before."""
    random.seed(1234)
    np.random.seed(1234)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(1234)
