"""The tokenizer gives every text back, whatever is in it; training is deterministic and bounded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from elle_mp.data.builtin import read_builtin
from elle_mp.data.tokenizer import Tokenizer, sample_lines, train_sentencepiece
from elle_mp.errors import UserError
from tests.data.text import make_texts

TRICKY = [
    "",
    " ",
    "  leading and trailing  ",
    "\t\tif x:\n\t\t\treturn  1\r\n\n\n    # four blanks\n",
    "\u2581 is what sentencepiece writes for a blank; \u2581\u2581x\u2581",
    "<s> </s> <pad> <unk> <mask> <0x0A>",
    "emoji \U0001f600\U0001f469\u200d\U0001f4bb, zero \u200b width, \ufeff mark, \ufffd, \u3000, \u00a0 x",
    "e\u0301 and \u00e9, \ufb01 and fi, \u2160 and I, \uff21",
    "\x00\x01\x1f\x7f\x85\u2028\u2029",
    "日本語 русский العربية \U0010ffff",
]


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A small one of each kind."""
    folder = tmp_path_factory.mktemp("tokenizer")
    return train_sentencepiece(make_texts(300), 400, folder, request.param)


@pytest.mark.parametrize("text", TRICKY)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids.dtype == np.int64 and not np.isin(ids, tokenizer.special_ids).any()


@given(text=st.text())
@settings(max_examples=200, deadline=None)
def test_round_trip_of_any_text(shared: Tokenizer, text: str) -> None:
    assert shared.decode(shared.encode(text)) == text


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One for hypothesis, which runs a test many times."""
    return train_sentencepiece(make_texts(300), 400, tmp_path_factory.mktemp("shared"))


def test_round_trip_of_source_code(shared: Tokenizer) -> None:
    for text in list(read_builtin("code", "valid"))[:10]:
        assert shared.decode(shared.encode(text)) == text


def test_batch_equals_one_by_one(tokenizer: Tokenizer) -> None:
    texts = TRICKY + make_texts(50)
    for threads in (None, 1, 3):
        batch = tokenizer.encode_batch(texts, threads)
        assert all(np.array_equal(a, tokenizer.encode(b)) for a, b in zip(batch, texts, strict=True))
    assert tokenizer.encode_batch([]) == []


def test_reserved_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 400
    assert tokenizer.special_ids == (0, 1, 2, 3, 4)
    assert tokenizer.decode([tokenizer.eos_id, tokenizer.mask_id, tokenizer.pad_id, tokenizer.bos_id]) == ""


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tokenizer.save(tmp_path / "deep" / "folder")
    for place in (path, path.parent):
        again = Tokenizer.load(place)
        assert again.fingerprint == tokenizer.fingerprint and again.model == tokenizer.model
    assert [item.name for item in path.parent.iterdir()] == ["tokenizer.model"]


def test_training_is_deterministic(shared: Tokenizer, tmp_path: Path) -> None:
    again = train_sentencepiece(iter(make_texts(300)), 400, tmp_path)
    assert again.fingerprint == shared.fingerprint


def test_the_sample_is_bounded_seeded_and_spread() -> None:
    texts = [f"line {number} of the text" for number in range(4000)]
    size = sum(len(text) for text in texts)
    sample = sample_lines(texts, size // 4, seed=1)
    assert size // 10 < sum(map(len, sample)) <= size // 4
    assert sample == [text for text in texts if text in set(sample)]
    thirds = [
        sum(1 for text in sample if start <= int(text.split()[1]) < start + 1000) for start in range(0, 4000, 1000)
    ]
    assert min(thirds) > 0.6 * max(thirds)
    assert sample == sample_lines(iter(texts), size // 4, seed=1) != sample_lines(texts, size // 4, seed=2)
    endless = (f"line {number}" for number in iter(int, 1))
    assert sample_lines(endless, 1000, seed=1)
    assert sample_lines(["a\n\n  \n" + "b" * 2500], 10**6, 1) == ["a", "b" * 1000, "b" * 1000, "b" * 500]


def test_vocabularies_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"too large for this text; the largest that works is (\d+)") as caught:
        train_sentencepiece(make_texts(5), 30000, tmp_path)
    largest = int(str(caught.value).split()[-1])
    assert train_sentencepiece(make_texts(5), largest, tmp_path / "fits").vocab_size == largest
    with pytest.raises(UserError, match=r"the smallest that works is \d+"):
        train_sentencepiece(make_texts(50), 262, tmp_path)
    with pytest.raises(UserError, match="there is none"):
        train_sentencepiece(["", "\n"], 400, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["fits"]


def test_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"something else")
    with pytest.raises(UserError, match="not a sentencepiece model"):
        Tokenizer.load(tmp_path)
    lines = iter("\n".join(make_texts(100)).split("\n"))
    with (tmp_path / "tokenizer.model").open("wb") as handle:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=handle, vocab_size=100, minloglevel=4
        )
    with pytest.raises(UserError, match="lacks"):
        Tokenizer.load(tmp_path)
