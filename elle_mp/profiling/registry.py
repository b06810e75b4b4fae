"""Every entry of the profiler, and what a user may choose among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from elle_mp.errors import UserError
from elle_mp.profiling import attention, embedding, growth, loss, norms
from elle_mp.profiling.entry import Entry

ENTRIES: tuple[Entry, ...] = (
    *attention.ENTRIES,
    *loss.ENTRIES,
    *norms.ENTRIES,
    *embedding.ENTRIES,
    *growth.ENTRIES,
)


def chosen(ops: Sequence[str], shapes: Sequence[str], dtypes: Sequence[str], quick: bool) -> list[Entry]:
    """The entries that were asked for, with the shapes and types that were asked for; without a wish all.

    Raises:
        UserError: there is no such op, none of the chosen ops takes such a shape, or it has no such type.
    """
    known = [entry.name for entry in ENTRIES]
    for name in ops:
        if name not in known:
            raise UserError(f"--op {name}: there is no such op; there are {', '.join(known)}")
    entries = [entry for entry in ENTRIES if not ops or entry.name in ops]
    if shapes:
        entries = _with_shapes(entries, shapes)
    elif quick:
        entries = [replace(entry, shapes=entry.shapes[:1]) for entry in entries]
    return _with_dtypes(entries, dtypes) if dtypes else entries


def _with_shapes(entries: Sequence[Entry], shapes: Sequence[str]) -> list[Entry]:
    wanted = [parse_shape(shape) for shape in shapes]
    kinds = {entry.name: len(entry.shapes[0]) for entry in entries}
    for text, shape in zip(shapes, wanted, strict=True):
        if len(shape) not in kinds.values():
            lines = "; ".join(dict.fromkeys(f"{entry.name} {entry.dims}" for entry in entries))
            raise UserError(f"--shape {text}: none of the ops takes {len(shape)} numbers; {lines}")
    fitting = {name: tuple(shape for shape in wanted if len(shape) == count) for name, count in kinds.items()}
    return [replace(entry, shapes=fitting[entry.name]) for entry in entries if fitting[entry.name]]


def _with_dtypes(entries: Sequence[Entry], dtypes: Sequence[str]) -> list[Entry]:
    choices = list(dict.fromkeys(dtype for entry in entries for dtype in entry.dtypes))
    for dtype in dtypes:
        if dtype not in choices:
            raise UserError(f"--dtype {dtype}: not a type of the chosen ops; there are {', '.join(choices)}")
    kept = {entry.name: tuple(dtype for dtype in entry.dtypes if dtype in dtypes) for entry in entries}
    return [replace(entry, dtypes=kept[entry.name]) for entry in entries if kept[entry.name]]


def parse_shape(text: str) -> tuple[int, ...]:
    """``4x512x768`` as numbers.

    Raises:
        UserError: it is something else.
    """
    parts = text.lower().split("x")
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"--shape {text}: give positive numbers joined by x, such as 4x512x768")
    return tuple(int(part) for part in parts)
