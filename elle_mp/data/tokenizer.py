"""The tokenizer: a sentencepiece model that gives every text back to the last character.

No normalisation, no added or removed blanks, and a byte piece for whatever is not in the vocabulary (line
ends and tabs among them), so ``decode(encode(text)) == text``. Sentencepiece itself writes a blank as U+2581
and would give a literal U+2581 back as a blank; here that one character is encoded by its three byte pieces.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from elle_mp.data.files import file_errors, write_whole
from elle_mp.data.hashing import derive_key, mix64
from elle_mp.errors import UserError, existing_file

MODEL_FILE = "tokenizer.model"
MASK_PIECE = "<mask>"
META_SYMBOL = "\u2581"
LINE_BYTES = 4000
"""Longer lines are cut before training; sentencepiece would leave them out."""
READ_FACTOR = 16
"""Training reads this many times its sample from the source, and no more."""
CONTROL = re.compile("[\x00-\x1f\x7f\u2581]")


class Tokenizer:
    """A sentencepiece model with byte fallback.

    Args:
        model: the bytes of ``tokenizer.model``.
        origin: where they come from, for messages.

    Raises:
        UserError: not a sentencepiece model, or one without byte pieces, ``<mask>``, or the other reserved
            ids.
    """

    def __init__(self, model: bytes, origin: str = MODEL_FILE) -> None:
        self.model = model
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"{origin}: not a sentencepiece model; make one with 'elle-mp data train-tokenizer'"
            ) from error
        self.vocab_size: int = self._pieces.get_piece_size()
        """Ids are below it; the embedding table may be padded beyond."""
        self.unk_id: int = self._pieces.unk_id()
        self.bos_id: int = self._pieces.bos_id()
        self.eos_id: int = self._pieces.eos_id()
        """Ends every document."""
        self.pad_id: int = self._pieces.pad_id()
        self.mask_id: int = self._pieces.piece_to_id(MASK_PIECE)
        self.fingerprint: str = hashlib.sha256(model).hexdigest()
        """SHA-256 of the model's bytes."""
        self._meta_bytes = [self._pieces.piece_to_id(f"<0x{byte:02X}>") for byte in META_SYMBOL.encode()]
        ids = [self.bos_id, self.eos_id, self.pad_id, self.mask_id, *self._meta_bytes]
        if min(ids) < 0 or self.mask_id == self.unk_id or self._meta_bytes[0] == self.unk_id:
            raise UserError(
                f"{origin}: the model lacks <s>, </s>, <pad>, {MASK_PIECE} or byte pieces; "
                f"make one with 'elle-mp data train-tokenizer'"
            )

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Reads ``path``: the file, or a folder with ``tokenizer.model`` in it."""
        file = existing_file(path / MODEL_FILE if path.is_dir() else path, "tokenizer")
        with file_errors("read", file):
            return cls(file.read_bytes(), str(file))

    def save(self, folder: Path) -> Path:
        """Writes ``folder/tokenizer.model``, whole or not at all; returns its path."""
        write_whole(folder / MODEL_FILE, self.model)
        return folder / MODEL_FILE

    @property
    def special_ids(self) -> tuple[int, ...]:
        """The reserved ids, sorted: unk, bos, eos, pad, mask."""
        return tuple(sorted({self.unk_id, self.bos_id, self.eos_id, self.pad_id, self.mask_id}))

    def encode(self, text: str) -> NDArray[np.int64]:
        """The ids of a text [n], without marks of beginning or end."""
        return np.asarray(self._encode(text), dtype=np.int64)

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[NDArray[np.int64]]:
        """:meth:`encode` of each text, on ``threads`` threads (default: those of this process, at most 8)."""
        if threads is None:
            threads = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        plain = [index for index, text in enumerate(texts) if META_SYMBOL not in text]
        encoded = dict(zip(plain, self._pieces.encode([texts[i] for i in plain], num_threads=threads), strict=True))
        return [
            np.asarray(encoded[index] if index in encoded else self._encode(text), dtype=np.int64)
            for index, text in enumerate(texts)
        ]

    def decode(self, ids: Iterable[int] | NDArray[np.integer]) -> str:
        """The text of ids [n]; reserved ids other than unk give nothing, an id outside raises IndexError."""
        text: str = self._pieces.decode(np.asarray(ids, dtype=np.int64).tolist())
        return text

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for index, part in enumerate(text.split(META_SYMBOL)):
            ids += self._meta_bytes if index else []
            ids += self._pieces.encode(part)
        return ids


def train_sentencepiece(
    texts: Iterable[str],
    vocab_size: int,
    out_dir: Path,
    model_type: Literal["unigram", "bpe"] = "unigram",
    seed: int = 1,
) -> Tokenizer:
    """Trains a tokenizer and saves it as ``out_dir/tokenizer.model``.

    The same texts, size and seed give the same bytes on every machine with the same sentencepiece.

    Args:
        texts: documents; a sample of bounded size is taken of them, whatever their number.
        vocab_size: pieces, the 256 byte pieces and 5 reserved ones included.
        out_dir: a folder, made when missing.
        model_type: ``unigram`` or ``bpe``.
        seed: chooses the sample, where there is more text than that.

    Raises:
        UserError: the vocabulary is too large or too small for the text (the message says what works), no
            text.
    """
    lines = sample_lines(texts, sample_bytes(vocab_size), seed)
    if not lines:
        raise UserError("the tokenizer needs text to learn from, and there is none")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            control_symbols=[MASK_PIECE],
            character_coverage=0.9995,
            max_sentence_length=2 * LINE_BYTES,
            num_threads=1,  # sums over threads would make the pieces depend on their number
            minloglevel=4,
        )
    except RuntimeError as error:
        raise UserError(training_error(str(error), vocab_size)) from error
    tokenizer = Tokenizer(model.getvalue())
    tokenizer.save(out_dir)
    return tokenizer


def training_error(message: str, vocab_size: int) -> str:
    """Sentencepiece's complaint as one line that says what would be right."""
    given = f"tokenizer.vocab_size={vocab_size}"
    if found := re.search(r"too high.*<= (\d+)", message):
        return f"{given} is too large for this text; the largest that works is {found[1]}"
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return f"{given} is too small for this text; the smallest that works is {found[1]}"
    return f"the tokenizer could not be trained: {' '.join(message.split())}"


def sample_bytes(vocab_size: int) -> int:
    """How much text a vocabulary is trained on: 400 bytes a piece, from 1 to 256 MB."""
    return min(max(400 * vocab_size, 1_000_000), 256_000_000)


def sample_lines(texts: Iterable[str], budget: int, seed: int) -> list[str]:
    """A sample of the lines of ``texts``, of at most ``budget`` bytes, in their order.

    A line stays while the hash of its number is below a threshold that is halved whenever the sample has
    grown over the budget: memory is bounded, and the sample is spread over everything that is read.
    """
    kept: list[tuple[int, str, int]] = []
    size = read = number = 0
    threshold = 1 << 64
    key = np.uint64(derive_key("tokenizer", seed))
    for text in texts:
        lines = list(training_lines(text))
        hashes = mix64(np.arange(number, number + len(lines), dtype=np.uint64) ^ key).tolist()
        number += len(lines)
        for value, (line, count) in zip(hashes, lines, strict=True):
            read += count
            if value < threshold:
                kept.append((value, line, count))
                size += count
        while size > budget:
            threshold //= 2
            kept = [item for item in kept if item[0] < threshold]
            size = sum(item[2] for item in kept)
        if read > READ_FACTOR * budget:
            break
    return [line for _, line, _ in kept]


def training_lines(text: str) -> Iterator[tuple[str, int]]:
    """The lines of a document as training sees them, each with its number of bytes: no control characters,
    none long.
    """
    for line in text.split("\n"):
        line = CONTROL.sub("", line)
        for start in range(0, len(line), LINE_BYTES // 4):
            piece = line[start : start + LINE_BYTES // 4]
            if piece.strip():
                yield piece, len(piece.encode())
