"""Errors that a rank has only because another one went away."""

from __future__ import annotations

import torch.distributed as dist

from elle_mp.errors import UserError

PHRASES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connection refused",
    "Socket closed",
    "Socket Timeout",
    "Timed out waiting",
    "remote process exited",
    "NCCL error",
    "NCCL communicator was aborted",
)
"""What gloo and NCCL say when another rank is the reason."""
TIMED_OUT = "Timed out waiting"


def comes_from_a_peer(error: BaseException) -> bool:
    """Whether a rank failed because another one did: what it says is not what is wrong."""
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause)
        if isinstance(cause, (dist.DistError, RuntimeError, UserError)) and any(item in text for item in PHRASES):
            return True
        cause = cause.__cause__
    return False
