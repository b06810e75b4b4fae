"""``elle-mp doctor``: what is installed, built and reachable; what is missing and how to get it."""

from __future__ import annotations


def doctor() -> None:
    """Say what is installed, built and reachable, and how to get what is missing."""
