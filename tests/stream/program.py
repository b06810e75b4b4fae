"""The program itself, with a signal at an exact place of the stream: no test has to race with it.

``program.py STRIKE pretrain CONFIG ...`` runs ``elle-mp pretrain``, or another command. STRIKE is ``-`` or
``RANK:SIGNAL[+SIGNAL]@PLACE=COUNT``: before the COUNT-th PLACE, RANK (or ``all``) sends itself the signals.
``program.py serve`` reads runs from standard input, forks for each, and prints its exit code.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

import elle_mp.stream.grow_command as grow_command
import elle_mp.stream.runner as runner
from elle_mp.checkpoint.offline import OfflineGrowth
from elle_mp.cli.main import main
from elle_mp.observe.journal import Journal

PLACES: dict[str, tuple[Any, str]] = {
    "step": (runner.Trainer, "step"),
    "grew": (Journal, "grew"),
    "evaluation": (Journal, "evaluation"),
    "results": (Journal, "results"),
    "block": (OfflineGrowth, "produce"),
    "close": (grow_command, "close_grown"),
}


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
            for number in signals.split("+"):
                os.kill(os.getpid(), getattr(signal, number))
        return inner(*args, **kwargs)

    setattr(owner, method, outer)


def serve() -> list[str] | None:
    """Forks for every line of standard input; returns a child's arguments in the child, None at the end."""
    for line in iter(sys.stdin.readline, ""):
        out, err, environment, seconds, arguments = json.loads(line)
        child = os.fork()
        if child == 0:
            os.setsid()
            signal.alarm(seconds)
            os.environ.update(environment)
            for path, stream in ((out, 1), (err, 2)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
            return arguments
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return None


if __name__ == "__main__":
    given = sys.argv[1:]
    if given == ["serve"]:
        import torch._dynamo  # noqa: F401  (which torch imports with the first DTensor, for most of a second)

        import elle_mp.stream.run  # noqa: F401  (what the command imports when it starts)

        given = serve() or sys.exit()
    if given[0] != "-":
        prepare(given[0])
    main(given[1:])
