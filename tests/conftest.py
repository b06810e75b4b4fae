"""What holds for every test: one thread per process, no network, the same seeds."""

from __future__ import annotations

import os
import random
import sys

import numpy as np
import pytest

# Read when torch is first imported, by this process and by those that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same generator states, whichever tests ran before."""
    random.seed(1234)
    np.random.seed(1234)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(1234)
