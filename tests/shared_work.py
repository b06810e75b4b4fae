"""What several tests need and one makes: in whichever of pytest's processes it is needed first."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

FOLDER = "ELLE_MP_TESTS_SHARED"
"""The variable that names the folder, see ``tests/conftest.py``."""


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """A folder that ``make`` has filled, once for all of pytest's processes; the others wait for it.

    If ``make`` raises, so does every test that needs it, each from a try of its own in a folder of its own.
    """
    root = Path(os.environ[FOLDER])
    done = root / f"{name}.done"
    with (root / f"{name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            number = len(list(root.glob(f"{name}.try-*")))
            folder = root / f"{name}.try-{number}"
            folder.mkdir()
            make(folder)
            done.write_text(folder.name)
        return root / done.read_text()
