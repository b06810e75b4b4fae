"""``elle-mp checkpoint``: what a checkpoint holds, whether it is whole, and its tensors in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="Show, check and consolidate checkpoints.", no_args_is_help=True)

Checkpoint = Annotated[
    Path, typer.Argument(metavar="CKPT", help="A checkpoint folder, or a run directory for its latest.")
]


@app.command()
def info(
    checkpoint: Checkpoint,
    json_output: Annotated[
        bool, typer.Option("--json", help="Everything, each tensor and file included, as JSON.")
    ] = False,
) -> None:
    """Step, stage, model, tensors, files, the layout that wrote it, and the growths that led to it."""
    import json

    from elle_mp.checkpoint.describe import checkpoint_folder, describe

    about = describe(checkpoint_folder(checkpoint))
    if json_output:
        typer.echo(json.dumps(about, indent=1))
        return
    for name, value in summary_lines(about):
        typer.echo(f"{name:<11} {value}")


@app.command()
def verify(checkpoint: Checkpoint) -> None:
    """Read every file and compare its SHA-256 with the one taken when it was written."""
    from elle_mp.checkpoint.describe import checkpoint_folder
    from elle_mp.checkpoint.store import CheckpointStore
    from elle_mp.checkpoint.stream_reader import StoredTensors

    folder = checkpoint_folder(checkpoint)
    CheckpointStore(folder.parent).verify(folder.name)
    stored = StoredTensors(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    typer.echo(f"{folder}: {len(stored.tensors)} tensors, {decimal(size)}, all as written")


@app.command()
def consolidate(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new .safetensors file.")],
    optimizer: Annotated[bool, typer.Option("--optimizer", help="The optimizer's tensors as well.")] = False,
) -> None:
    """Write all tensors of the model into one .safetensors file, in bounded memory.

    The checkpoint's hashes are checked first.
    """
    from elle_mp.checkpoint.consolidate import consolidate as write
    from elle_mp.checkpoint.describe import checkpoint_folder
    from elle_mp.checkpoint.stream_reader import StoredTensors
    from elle_mp.errors import UserError

    if out.is_dir():
        raise UserError(f"{out} is a folder; give a file, such as {out / 'model.safetensors'}")
    count, size = write(StoredTensors(checkpoint_folder(checkpoint), check_hashes=True), out, optimizer)
    typer.echo(f"{out}: {count} tensors, {decimal(size)}")


def summary_lines(about: dict[str, Any]) -> list[tuple[str, str]]:
    """What ``info`` prints: a name and a value per line."""
    state, model = about["state"], about["model"]
    lines = [("checkpoint", f"{about['folder']}{' (permanent)' if about['permanent'] else ''}")]
    if state:
        lines.append(("step", f"{state['global_step']} of the run, {state['tokens']:,} tokens"))
        lines.append(("position", f"stage {state['stage']}, {state['phase']}, step {state['step']}"))
    if model is not None:
        sizes = ", ".join(f"{key} {value}" for key, value in model.items() if key != "family")
        lines.append(("model", f"{model['family']}: {sizes}"))
        lines.append(("parameters", f"{about['parameters']:,}"))
    dtypes = ", ".join(sorted({item["dtype"] for item in about["tensors"].values()}))
    lines.append(("tensors", f"{len(about['tensors'])}, {decimal(about['bytes'])}, {dtypes}"))
    files = about["files"]
    lines.append(("files", f"{len(files)}, {decimal(sum(entry['size'] for entry in files.values()))}"))
    lines.append(("written by", written_by(about)))
    lines += [("grown", growth_line(growth)) for growth in about["lineage"]]
    return lines


def written_by(about: dict[str, Any]) -> str:
    """The layout that wrote a checkpoint, as far as it is known."""
    ranks, layout = about["ranks"], about["layout"]
    words = "unknown" if ranks is None else f"{ranks} rank{'s' if ranks > 1 else ''}"
    axes = [f"{key} {value}" for key, value in (layout or {}).items() if value not in (1, None, False)]
    return ", ".join([words, *axes])


def growth_line(growth: dict[str, Any]) -> str:
    """A growth: the sizes that changed, and how."""
    before, after = growth["from"], growth["to"]
    sizes = ", ".join(f"{key} {before[key]} to {after[key]}" for key in before if before[key] != after[key])
    exact = "exact" if growth["exact"] else "not exact"
    return f"{sizes or 'nothing'} (width {growth['width']}, depth {growth['depth']}, {exact})"


def decimal(size: int) -> str:
    """Bytes in a unit that leaves few digits."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size} bytes"
