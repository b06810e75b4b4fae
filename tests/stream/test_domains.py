"""What each stage reads: the same samples as ever while the length stays, longer ones when it grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from elle_mp.config import Config
from elle_mp.config_file import load_config, parse_config
from elle_mp.data.batches import Batch, BatchBuilder, DomainSamples, valid_batches, valid_masking
from elle_mp.data.build import prepare_domain
from elle_mp.data.masking import MlmMasking
from elle_mp.data.memory import choose_memory
from elle_mp.errors import UserError
from elle_mp.stream.domains import RECOVER, TRAIN, Domains, check_data, open_domains
from tests.distributed_utils import run_distributed
from tests.stream.runs import write_stream


def opened(config: Config, folder: Path) -> Domains:
    return open_domains(config, folder, lambda line: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("domains")


def changed(folder: Path, family: str = "gpt", grow: dict[int, dict[str, int]] | None = None, **memory: Any) -> Config:
    """The stream of the tests with other growths; without ``grow`` no stage grows."""
    tree = load_config(write_stream(folder, family)).model_dump(mode="json", by_alias=True)
    for index, stage in enumerate(tree["stream"]):
        stage["grow"] = (grow or {}).get(index)
    tree["memory"] |= memory
    return parse_config(tree)


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(getattr(one, part), getattr(other, part)) for part in ("tokens", "targets", "domain", "key"))


def check_samples_of_one_length(folder: Path, family: str) -> None:
    """Against batches put together by hand from every domain's text at one length."""
    config = changed(folder, family)
    domains = opened(config, folder / family)
    tokenizer, length = domains.tokenizer, 31
    objective = "mlm" if family == "bert" else "causal"
    train, valid, memory = [], [], []
    for index, stage in enumerate(config.stream):
        data = prepare_domain(stage.domain, config.stage_data(index), tokenizer, folder / family / "data")
        packed = data.packed("train", length, objective)
        train.append(DomainSamples(index, packed))
        valid.append(DomainSamples(index, data.packed("valid", length, objective)))
        memory.append(DomainSamples(index, packed, choose_memory(len(packed), length, 700, 3, stage.domain)))
    masking = (
        MlmMasking(3, tokenizer.vocab_size, tokenizer.mask_id, tokenizer.special_ids) if family == "bert" else None
    )
    held = valid_masking(objective, 3, tokenizer.vocab_size, tokenizer.mask_id, tokenizer.special_ids)
    for stage in range(3):
        for number, phase in enumerate((RECOVER, TRAIN)):
            if stage == 0 and phase == RECOVER:
                continue
            new = train[stage] if phase == TRAIN else None
            wanted = BatchBuilder(
                seed=3,
                stage=stage,
                phase=number,
                new=new,
                memories=memory[:stage],
                replay=0.25,
                batch=8,
                masking=masking,
            )
            builder = domains.builder(stage, phase)
            assert all(same(builder.batch(step), wanted.batch(step)) for step in range(5))
        for domain in range(stage + 1):
            pairs = zip(domains.held_out(domain, stage), valid_batches(valid[domain], 4, 2, held), strict=True)
            assert all(same(one, other) for one, other in pairs)


@pytest.mark.parametrize("family", ["gpt", "bert"])
def test_the_same_samples_as_long_as_the_length_stays(folder: Path, family: str) -> None:
    run_distributed(check_samples_of_one_length, 1, folder, family)


def check_longer_samples(folder: Path) -> None:
    config = changed(folder, grow={1: {"seq_len": 48}})
    domains, short = opened(config, folder / "longer"), opened(changed(folder), folder / "longer")
    assert [domains.text_length(stage) for stage in range(3)] == [31, 47, 47]
    assert same(domains.builder(0, TRAIN).batch(2), short.builder(0, TRAIN).batch(2))
    for stage, phase in ((1, RECOVER), (1, TRAIN), (2, TRAIN)):
        assert domains.builder(stage, phase).batch(0).tokens.shape == (8, 47)
    # Before a growth and after it: valid text of the old length; in the stages then on, of the new one.
    assert domains.probe(1).tokens.shape == (4, 31) and domains.probe(2).tokens.shape == (8, 47)
    assert all(same(*pair) for pair in zip(domains.held_out(0, 0), short.held_out(0, 2), strict=True))
    assert {batch.tokens.shape[1] for batch in domains.held_out(0, 1)} == {47}
    # The memory: by the same rule, of as many tokens, from all training text.
    for domain in (0, 1):
        memory = domains.samples("memory", domain, 2)
        everything = domains.samples("train", domain, 2)
        assert memory is domains.samples("memory", domain, 1) and len(memory) == min(700 // 47, len(everything))
        name = config.stream[domain].domain
        assert np.array_equal(memory.memory, choose_memory(len(everything), 47, 700, 3, name))
        stream = everything.samples.stream
        for row, index in zip(memory.gather(np.arange(len(memory))), memory.memory.tolist(), strict=True):
            assert np.array_equal(row, stream[47 * index : 47 * index + 48])


def test_longer_samples_from_the_stage_that_grows(folder: Path) -> None:
    run_distributed(check_longer_samples, 1, folder)


def check_too_little_text(folder: Path) -> None:
    config = changed(folder, grow={2: {"seq_len": 100_000}}, tokens=200_000)
    with pytest.raises(
        UserError, match=r"^domain a, train text: \d+ tokens of text are too few for one sample of 100000"
    ):
        opened(config, folder / "little")


def test_text_that_is_too_short_later_is_an_error_now(folder: Path) -> None:
    run_distributed(check_too_little_text, 1, folder)


def test_a_memory_too_small_for_the_longest_sample_is_an_error_now(folder: Path) -> None:
    config = changed(folder, grow={2: {"seq_len": 1001}})
    with pytest.raises(UserError, match=r"^memory\.tokens=700 holds no whole sample of 1000 text tokens; .* is 1000$"):
        check_data(config)


def test_fewer_ids_than_the_tokenizer_given_has(folder: Path) -> None:
    from elle_mp.data.tokenizer import train_sentencepiece
    from tests.stream.runs import documents

    made = train_sentencepiece(iter(documents(0)), 320, folder / "tokenizer")
    for place in ("model", "grow"):
        tree = changed(folder).model_dump(mode="json", by_alias=True)
        tree["tokenizer"] |= {"path": str(folder / "tokenizer"), "vocab_size": 5000}
        if place == "model":
            tree["model"]["vocab"] = 310
        else:
            tree["stream"][1]["grow"] = {"vocab": 310}
        key = "model.vocab" if place == "model" else "stream.1.grow.vocab"
        wanted = rf"^{key}=310 is smaller than the {made.vocab_size} ids of the tokenizer; 320 or more would do$"
        with pytest.raises(UserError, match=wanted):
            check_data(parse_config(tree))
