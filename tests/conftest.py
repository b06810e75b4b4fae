"""What holds for every test: one thread per process, no network, the same seeds, two tests at a time."""

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
"""Each may have six processes besides itself, of some 400 MB."""


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """How many processes run tests: one a core for the whole suite, none besides this one for a part of it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    whole = config.args == config.getini("testpaths") and not config.option.keyword
    return min(cores, MOST_WORKERS) if whole and cores > 1 else 0


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
