"""``elle-mp data``: train a tokenizer; tokenise, inspect and check text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from elle_mp.data.indexed import IndexedDataset

app = typer.Typer(help="Train a tokenizer; tokenise, inspect and check text.", no_args_is_help=True)

Source = Annotated[str, typer.Option("--input", help=".jsonl, .txt, a folder with train/valid, or builtin:NAME.")]


@app.command("train-tokenizer")
def train_tokenizer(
    sources: Annotated[
        list[str], typer.Option("--input", help=".jsonl, .txt, a folder, or builtin:NAME; may be repeated.")
    ],
    vocab_size: Annotated[int, typer.Option(min=300, help="Pieces, the 256 byte pieces included.")],
    out: Annotated[Path, typer.Option(help="Folder for tokenizer.model.")],
    model_type: Annotated[str, typer.Option(help="unigram or bpe.")] = "unigram",
    seed: Annotated[int, typer.Option(help="Chooses the sample, where the text is larger.")] = 1,
) -> None:
    """Train a sentencepiece tokenizer (byte fallback, no normalisation) on the train part of the inputs."""
    from itertools import chain

    from elle_mp.data.sources import check_source, read_documents
    from elle_mp.data.tokenizer import train_sentencepiece
    from elle_mp.errors import UserError

    if model_type not in ("unigram", "bpe"):
        raise UserError(f"--model-type {model_type}: unknown; give unigram or bpe")
    for source in sources:
        check_source(source)
    texts = chain.from_iterable(read_documents(source, "train") for source in sources)
    tokenizer = train_sentencepiece(texts, vocab_size, out, model_type, seed)  # type: ignore[arg-type]
    typer.echo(f"{out / 'tokenizer.model'}: {tokenizer.vocab_size} pieces")


@app.command()
def build(
    source: Source,
    tokenizer: Annotated[Path, typer.Option(help="Folder with tokenizer.model, or the file.")],
    out: Annotated[Path, typer.Option(help="Prefix: leaves PREFIX.bin, PREFIX.idx and PREFIX.json.")],
    split: Annotated[
        str | None, typer.Option(help="train, valid or all; default: all of a file, train of the rest.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Tokenise text to Megatron's .bin/.idx format."""
    from elle_mp.data.build import build_prefix
    from elle_mp.data.tokenizer import Tokenizer
    from elle_mp.errors import UserError

    if split not in (None, "train", "valid", "all"):
        raise UserError(f"--split {split}: unknown; give train, valid or all")
    about = build_prefix(source, Tokenizer.load(tokenizer), out, split, overwrite)  # type: ignore[arg-type]
    typer.echo(f"{out}.bin, {out}.idx: {about['documents']} documents, {about['tokens']} tokens")


@app.command()
def info(
    prefix: Annotated[Path, typer.Argument(help="PREFIX of PREFIX.bin and PREFIX.idx.")],
    tokenizer: Annotated[Path | None, typer.Option(help="Shows the beginnings of documents as text.")] = None,
    samples: Annotated[int, typer.Option(min=0, help="How many documents to show.")] = 3,
) -> None:
    """Show documents, tokens and a histogram of lengths."""
    from elle_mp.data.indexed import IndexedDataset
    from elle_mp.data.tokenizer import Tokenizer

    dataset = IndexedDataset(prefix)
    typer.echo(f"documents  {len(dataset)}")
    typer.echo(f"tokens     {dataset.num_tokens}")
    typer.echo(f"dtype      {dataset.tokens.dtype}")
    show_lengths(dataset)
    if tokenizer is not None:
        pieces = Tokenizer.load(tokenizer)
        for index in range(min(samples, len(dataset))):
            text = pieces.decode(dataset.document(index)[:64])
            typer.echo(f"[{index}] {' '.join(text.split())}")


def show_lengths(dataset: IndexedDataset) -> None:
    """Prints how many documents have how many tokens, by powers of two."""
    import numpy as np

    if not len(dataset):
        return
    lengths = dataset.lengths
    typer.echo(f"lengths    shortest {lengths.min()}, median {int(np.median(lengths))}, longest {lengths.max()}")
    buckets = np.bincount(np.ceil(np.log2(np.maximum(lengths, 1))).astype(int))
    for power, count in enumerate(buckets.tolist()):
        if count:
            typer.echo(f"  <= {1 << power:>9}  {count:>9}  {'#' * max(1, 40 * count // int(buckets.max()))}")


@app.command()
def verify(
    prefix: Annotated[Path, typer.Argument(help="PREFIX of PREFIX.bin and PREFIX.idx.")],
    tokenizer: Annotated[Path | None, typer.Option(help="Checks that the data was made with it.")] = None,
) -> None:
    """Check a data set: index, checksum, range of the ids, tokenizer."""
    from elle_mp.data.build import verify_prefix
    from elle_mp.data.tokenizer import Tokenizer

    for line in verify_prefix(prefix, Tokenizer.load(tokenizer) if tokenizer is not None else None):
        typer.echo(line)
