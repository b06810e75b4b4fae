"""All tensors of a checkpoint as one .safetensors file, in memory bounded by a block."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from elle_mp.checkpoint.data_file import DataFile
from elle_mp.checkpoint.stream_reader import StoredTensors
from elle_mp.checkpoint.stream_writer import blocks
from elle_mp.data.files import beside, file_errors, sync_file
from elle_mp.errors import UserError

MODEL = "model."  # what names of the model's tensors begin with

_BLOCK = 16 << 20  # bytes
_ALIGNMENT = 8  # of the data, as safetensors' own writer has it

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def consolidate(
    stored: StoredTensors, out: Path, optimizer: bool, progress: Callable[[int], None] | None = None
) -> tuple[int, int]:
    """Writes ``out``, whole or not at all: a tensor per name, as the checkpoint has them.

    Args:
        optimizer: everything that the checkpoint holds, and not the model's tensors alone.
        progress: called after each block with the bytes written since the last call.

    Returns:
        How many tensors, and the file's bytes.

    Raises:
        UserError: ``out`` is there, cannot be written, or the checkpoint cannot be read or put into such a file.
    """
    if out.exists():
        raise UserError(f"{out} is there already; give another name for the .safetensors file")
    tensors = {name: item for name, item in stored.tensors.items() if optimizer or name.startswith(MODEL)}
    if not tensors:
        raise UserError(f"{stored.folder} holds no tensors of a model")
    # The widest numbers first: then all are aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name][1].itemsize, name))
    header = _header({name: tensors[name] for name in order}, _about(stored.meta), stored.folder)
    temporary = beside(out)
    with file_errors("write", out):
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        try:
            # One buffer for every block: blocks of their own leave holes between them that no later one fits.
            buffer = torch.empty(_BLOCK, dtype=torch.uint8)
            with DataFile(temporary) as file:
                file.write(header)
                for name in order:
                    for bounds in blocks(*_sizes(tensors[name]), _BLOCK):
                        sizes = [high - low for low, high in bounds]
                        raw = buffer[: prod(sizes) * tensors[name][1].itemsize]
                        if len(raw):
                            stored.read_into(name, bounds, raw.view(tensors[name][1]).view(sizes))
                            file.write(raw.numpy().data)
                        if progress is not None:
                            progress(len(raw))
                file.finish()
            temporary.replace(out)
            sync_file(out.parent)
        finally:
            temporary.unlink(missing_ok=True)
    return len(tensors), file.size


def _sizes(item: tuple[tuple[int, ...], torch.dtype]) -> tuple[tuple[int, ...], int]:
    return item[0], item[1].itemsize


def _header(tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], about: dict[str, str], folder: Path) -> bytes:
    entries: dict[str, Any] = {"__metadata__": about}
    start = 0
    for name, (shape, dtype) in tensors.items():
        if dtype not in _NAMES:
            raise UserError(f"{folder}: tensor {name} is {dtype}, for which .safetensors has no name")
        end = start + prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _about(meta: Mapping[str, Any]) -> dict[str, str]:
    """What the file says of itself; such a file takes text only."""
    state = meta.get("state", {})
    about = {"format": "pt"}
    if "model" in meta:
        about["elle_mp.model"] = json.dumps(meta["model"])
    about |= {f"elle_mp.{key}": str(state[key]) for key in ("global_step", "stage", "phase") if key in state}
    return about
