"""The program itself, with a signal at an exact place of the stream: no test has to race with it.

``program.py STRIKE pretrain CONFIG ...`` runs ``elle-mp pretrain``, or another command. STRIKE is ``-`` or
``RANK:SIGNAL[+SIGNAL]@PLACE=COUNT``: before the COUNT-th PLACE, RANK (or ``all``) sends itself the signals. In the
place of signals may stand one of ACTS, with an argument behind a slash. A rank that stops itself is killed later.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import torch

import elle_mp.stream.grow_command as grow_command
import elle_mp.stream.runner as runner
from elle_mp.checkpoint.offline import OfflineGrowth
from elle_mp.cli.main import main
from elle_mp.errors import UserError
from elle_mp.models.transformer import Transformer
from elle_mp.observe.journal import Journal

PLACES: dict[str, tuple[Any, str]] = {
    "step": (runner.Trainer, "step"),
    "micro": (Transformer, "forward"),
    "grew": (Journal, "grew"),
    "evaluation": (Journal, "evaluation"),
    "results": (Journal, "results"),
    "block": (OfflineGrowth, "produce"),
    "close": (grow_command, "close_grown"),
}


KILLED_AFTER = 6
"""Seconds that a stopped rank lasts."""


def fail(_: Any, text: str) -> None:
    """A fault in the program."""
    raise RuntimeError(text)


def mistake(_: Any, text: str) -> None:
    """What a user has done wrong, and only this rank knows."""
    raise UserError(text)


def sleep(_: Any, seconds: str) -> None:
    """Keeps the other ranks waiting."""
    time.sleep(float(seconds))


def flip(trainer: Any, name: str) -> None:
    """Changes one bit of the first entry of a parameter of this rank, high enough to survive a step's rounding."""
    values = trainer.optimizer.shards[name]
    values.view(-1)[:1].view({4: torch.int32, 8: torch.int64}[values.element_size()]).bitwise_xor_(1 << 16)


ACTS = {"fail": fail, "mistake": mistake, "sleep": sleep, "flip": flip}


def act_on(act: str, owner: Any) -> None:
    """Does what a strike says."""
    name, _, argument = act.partition("/")
    if name in ACTS:
        ACTS[name](owner, argument)
        return
    if "SIGSTOP" in name and os.fork() == 0:
        time.sleep(KILLED_AFTER)
        os.kill(os.getppid(), signal.SIGKILL)
        os._exit(0)
    for number in name.split("+"):
        os.kill(os.getpid(), getattr(signal, number))


def prepare(strike: str) -> None:
    """Puts the strike in its place."""
    act, _, place = strike.partition("@")
    rank, _, signals = act.partition(":")
    name, _, wanted = place.partition("=")
    owner, method = PLACES[name]
    inner, left = getattr(owner, method), int(wanted)

    def outer(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0 and rank in ("all", os.environ.get("RANK", "0")):
            act_on(signals, args[0])
        return inner(*args, **kwargs)

    setattr(owner, method, outer)


def run(arguments: list[str]) -> None:
    """The program as if it had been started with these arguments."""
    sys.argv = [__file__, *arguments]
    strike, *given = arguments
    if strike != "-":
        prepare(strike)
    main(given)


if __name__ == "__main__":
    run(sys.argv[1:])
