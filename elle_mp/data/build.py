"""Tokenised domains: built once, kept under a key of what they were made of, found again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from elle_mp.data.files import beside, file_errors, sha256_file, write_whole
from elle_mp.data.hashing import derive_key
from elle_mp.data.indexed import IndexedDataset, IndexedWriter, bin_path, token_dtype
from elle_mp.data.packing import Objective, PackedSamples, pack
from elle_mp.data.sources import Split, check_source, indexed_prefix, read_documents, source_fingerprint
from elle_mp.data.tokenizer import Tokenizer
from elle_mp.errors import UserError

FORMAT = 1
"""Counts up whenever the same text and tokenizer give other files."""
BATCH_DOCUMENTS = 512
BATCH_CHARACTERS = 4_000_000
VALID_SHARE = 0.05
"""Of a tokenised source without a valid part of its own, its last documents are held out, up to this share.
"""
MANIFEST = "manifest.json"
SCAN_TOKENS = 1 << 24

Progress = Callable[[str, int, int], None]
"""Called with (split, documents so far, tokens so far)."""


@dataclass(frozen=True)
class DomainData:
    """The tokenised text of one domain."""

    domain: str
    train: IndexedDataset
    valid: IndexedDataset

    @property
    def train_tokens(self) -> int:
        """Tokens of the training text, end marks included."""
        return self.train.num_tokens

    @property
    def valid_tokens(self) -> int:
        """Tokens of the valid text, end marks included."""
        return self.valid.num_tokens

    def packed(self, split: str, text_length: int, objective: Objective) -> PackedSamples:
        """The samples of ``train`` or ``valid``; too little text for one raises :class:`UserError`."""
        dataset = self.train if split == "train" else self.valid
        return pack(dataset, text_length, objective, f"domain {self.domain}, {split} text")


def prepare_domain(
    domain: str, data: str, tokenizer: Tokenizer, cache_dir: Path, progress: Progress | None = None
) -> DomainData:
    """The tokenised domain, from the cache when the same text was tokenised by the same tokenizer before.

    A folder ``cache_dir/KEY`` (hash of the source's bytes, the tokenizer and the format) appears whole or not
    at all; several processes may prepare the same domain at once, the first to end leaves its result.

    Args:
        domain: the domain's name, for messages.
        data: see :mod:`elle_mp.data.sources`. A ``.bin/.idx`` prefix is used where it lies.
        tokenizer: its ``eos_id`` ends every document.
        cache_dir: a folder, made when missing.
        progress: see :data:`Progress`.

    Raises:
        UserError: bad or missing data, no document, tokens of another tokenizer, a place that cannot be
            written to.
    """
    prefix = indexed_prefix(data)
    if prefix is not None:
        return open_prefix(domain, prefix, tokenizer)
    check_source(data)
    source = source_fingerprint(data, cache_dir / "hashes")
    key = f"{derive_key(FORMAT, source, tokenizer.fingerprint):016x}"
    folder = cache_dir / key
    if not (folder / MANIFEST).is_file():
        build_folder(folder, data, tokenizer, {"source": source, "data": data}, progress)
    try:
        return DomainData(domain, IndexedDataset(folder / "train"), IndexedDataset(folder / "valid"))
    except UserError as error:
        raise UserError(f"the cached tokens are damaged ({error}); remove {folder} and run again") from error


def build_folder(
    folder: Path, data: str, tokenizer: Tokenizer, about: dict[str, Any], progress: Progress | None
) -> None:
    """Builds both splits and the manifest beside ``folder`` and puts them there in one step."""
    remove_leftovers(folder)
    temporary = beside(folder)
    with file_errors("write", folder):
        temporary.mkdir(parents=True, exist_ok=True)
    try:
        splits: tuple[Split, ...] = ("train", "valid")
        for split in splits:
            about[split] = tokenize(data, split, tokenizer, temporary / split, progress)
        about |= {"format": FORMAT, "tokenizer": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size}
        write_whole(temporary / MANIFEST, (json.dumps(about, indent=1) + "\n").encode())
        try:
            temporary.rename(folder)
        except OSError as error:
            if not (folder / MANIFEST).is_file():  # else another process was first, with the same result
                raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Removes what a killed process of this machine left of building ``folder``."""
    for path in folder.parent.glob(f".{folder.name}.writing-{os.uname().nodename}-*"):
        process = path.name.rpartition("-")[2]
        if process.isdigit() and not Path("/proc", process).exists() and Path("/proc/self").exists():
            shutil.rmtree(path, ignore_errors=True)


def tokenize(
    data: str, split: Split, tokenizer: Tokenizer, prefix: Path, progress: Progress | None = None
) -> dict[str, Any]:
    """Writes one split of ``data`` as ``prefix.bin/.idx`` (document, then eos); returns its counts and
    SHA-256.
    """
    documents = tokens = 0
    end = np.array([tokenizer.eos_id], dtype=np.int64)
    with IndexedWriter(prefix, token_dtype(tokenizer.vocab_size)) as writer:
        for batch in batched(read_documents(data, split)):
            for ids in tokenizer.encode_batch(batch):
                writer.add(np.concatenate([ids, end]))
                tokens += ids.size + 1
            documents += len(batch)
            if progress is not None:
                progress(split, documents, tokens)
        if not documents:
            raise UserError(f"{data}: its {split} part has no document; give at least one")
    return {"documents": documents, "tokens": tokens, "sha256": sha256_file(bin_path(prefix))}


def batched(documents: Iterator[str]) -> Iterator[list[str]]:
    """Lists of documents, bounded in number and in characters (but for a longer single document)."""
    batch: list[str] = []
    size = 0
    for document in documents:
        if batch and (len(batch) == BATCH_DOCUMENTS or size + len(document) > BATCH_CHARACTERS):
            yield batch
            batch, size = [], 0
        batch.append(document)
        size += len(document)
    if batch:
        yield batch


def manifest_path(prefix: Path) -> Path:
    """``PREFIX.json``, which ``data build`` writes beside the pair: counts, SHA-256, tokenizer."""
    return prefix.with_name(prefix.name + ".json")


def build_prefix(
    data: str,
    tokenizer: Tokenizer,
    out: Path,
    split: Split | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Tokenises ``data`` to ``out.bin``, ``out.idx`` and ``out.json``; returns the manifest.

    Args:
        data: see :mod:`elle_mp.data.sources`; not tokenised yet.
        tokenizer: its ``eos_id`` ends every document.
        out: path without suffix.
        split: default: all of a single file, the ``train`` part of anything else.
        overwrite: replace what is there.
        progress: see :data:`Progress`.
    """
    check_source(data)
    if split is None:
        split = "all" if Path(data).is_file() else "train"
    if not overwrite and bin_path(out).exists():
        raise UserError(f"{bin_path(out)} is there already; give another --out, or --overwrite")
    about = {"data": data, "split": split, "format": FORMAT}
    about |= tokenize(data, split, tokenizer, out, progress)
    about |= {"tokenizer": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size}
    write_whole(manifest_path(out), (json.dumps(about, indent=1) + "\n").encode())
    return about


def read_manifest(prefix: Path) -> dict[str, Any] | None:
    """What was written about a pair: in ``PREFIX.json``, or in the ``manifest.json`` of a cache folder.

    Raises:
        UserError: ``PREFIX.json`` is not such a manifest.
    """
    own, shared = manifest_path(prefix), prefix.with_name(MANIFEST)
    about = read_json(own)
    if own.is_file() and "sha256" not in about:
        raise UserError(f"{own}: not a manifest of tokenised data; build it again, or remove the file")
    if own.is_file():
        return about
    about = read_json(shared)
    part = about.get(prefix.name)
    return about | part if isinstance(part, dict) and "sha256" in part else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty when the file is missing or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def open_prefix(domain: str, prefix: Path, tokenizer: Tokenizer) -> DomainData:
    """A tokenised domain where it lies; its last documents (5 % of the tokens, at least one) are the valid
    text.

    Raises:
        UserError: made with another tokenizer, an id outside the vocabulary, fewer than two documents.
    """
    dataset = IndexedDataset(prefix)
    about = read_manifest(prefix)
    if about is not None and about.get("tokenizer") != tokenizer.fingerprint:
        raise UserError(f"{prefix}: tokenised with another tokenizer than the run's; build it again with the run's own")
    if about is None:
        check_token_range(dataset, tokenizer.vocab_size)
    if len(dataset) < 2:
        raise UserError(f"{prefix}: {len(dataset)} documents; at least two are needed, one of them as valid text")
    cut = int(np.searchsorted(dataset.starts, (1 - VALID_SHARE) * dataset.num_tokens))
    cut = min(max(cut, 1), len(dataset) - 1)
    return DomainData(domain, dataset.part(0, cut), dataset.part(cut, len(dataset)))


def check_token_range(dataset: IndexedDataset, vocab_size: int) -> None:
    """Reads every token; one outside the vocabulary raises :class:`UserError` that names its place."""
    for start in range(0, dataset.num_tokens, SCAN_TOKENS):
        part = dataset.tokens[start : start + SCAN_TOKENS]
        wrong = np.flatnonzero((part < 0) | (part >= vocab_size))
        if wrong.size:
            place = start + int(wrong[0])
            raise UserError(
                f"{bin_path(dataset.prefix)}: token {int(dataset.tokens[place])} at place {place} is outside "
                f"the vocabulary of {vocab_size}; it was built with another tokenizer"
            )


def verify_prefix(prefix: Path, tokenizer: Tokenizer | None = None) -> list[str]:
    """Checks a pair against its manifest and a tokenizer; returns what was checked, a line each.

    Raises:
        UserError: the first thing that is wrong.
    """
    dataset = IndexedDataset(prefix)
    done = [f"index: {len(dataset)} documents, {dataset.num_tokens} tokens, {dataset.tokens.dtype}"]
    about = read_manifest(prefix)
    if about is None:
        done.append("checksum: not checked, there is no manifest")
    else:
        if about.get("sha256") != sha256_file(bin_path(prefix)):
            raise UserError(
                f"{bin_path(prefix)}: its SHA-256 is not the manifest's: the file was changed; build it again"
            )
        done.append("checksum: as the manifest says")
    if tokenizer is not None and about is not None and about.get("tokenizer") != tokenizer.fingerprint:
        raise UserError(f"{prefix}: tokenised with another tokenizer; build it again, or give the one it was made with")
    vocab_size = tokenizer.vocab_size if tokenizer is not None else (about or {}).get("vocab_size")
    if vocab_size is None:
        done.append("token range: not checked, give --tokenizer")
    else:
        check_token_range(dataset, int(vocab_size))
        done.append(f"token range: every id below {vocab_size}")
    if tokenizer is not None:
        done.append("tokenizer: matches" if about is not None else "tokenizer: ids fit; which one made them is unknown")
    return done
