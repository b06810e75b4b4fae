"""How much memory an offline growth may take, and what it does with it."""

from __future__ import annotations

import ctypes
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from elle_mp.errors import UserError

BLOCKS_IN_MEMORY = 8
"""The old block, the new one, and at most six that a strategy makes on the way (noise in fp64, what is new, means)."""
RESERVE = 96 << 20
"""What else comes: buffers of the file that is written, tiles of random values, rows that are read for some of their
columns, the list of blocks."""
LARGEST_BLOCK = 16 << 20
"""Tensors of up to 32 MiB (glibc's largest ``mmap`` threshold) use memory of their predecessors; larger ones get fresh
pages from the kernel each time, which took longer than the disk did."""
SMALLEST_BLOCK = 1 << 20


def parse_bytes(text: str) -> int:
    """``4G``, ``800M``, ``1.5GiB``: all powers of 1024.

    Raises:
        UserError: it is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", text.strip().lower())
    if match is None:
        raise UserError(f"--max-memory {text}: give a size, for example 4G or 800M")
    return int(float(match[1]) * 1024 ** " kmgt".index(match[2] or " "))


def resident_bytes() -> int:
    """Memory that this process holds now; where the system does not say, the most that it has held."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return pages * os.sysconf("SC_PAGE_SIZE")


def largest_resident() -> int:
    """:func:`resident_bytes` of the largest rank, on every rank. Collective."""
    held: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(held, resident_bytes())
    return max(held)


def block_bytes(limit: int, longest_row: int = 0) -> int:
    """The largest block with which every process stays below ``limit`` bytes. Collective; the same on all ranks.

    Args:
        longest_row: the least that a block can be.

    Raises:
        UserError: the processes are larger already.
    """
    held = largest_resident() + RESERVE
    block = (limit - held) // BLOCKS_IN_MEMORY
    smallest = max(SMALLEST_BLOCK, longest_row)
    if block < smallest:
        least = -(-(held + BLOCKS_IN_MEMORY * smallest) // (1 << 20))
        raise UserError(f"--max-memory: the program itself takes {held >> 20} MiB; give {least}M or more")
    return min(block, LARGEST_BLOCK)


def keeper(limit: int, block: int) -> Callable[[], None]:
    """To be called between blocks: gives memory that is free inside of this process back to the system, when it holds
    so much that the next block might pass ``limit`` bytes.

    Blocks of many sizes leave holes that the C library keeps: a growth that holds 500 MB was seen at 1.6 GB.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None  # glibc's alone
    room = 2 * BLOCKS_IN_MEMORY * block  # the next block, and the holes that it leaves

    def keep() -> None:
        if trim is not None and resident_bytes() > limit - room:
            trim(0)

    return keep
