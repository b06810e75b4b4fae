"""The text of a stream: tokenizer, samples and memories of every domain, and the batches of every phase."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from elle_mp.config import Config
from elle_mp.data.batches import Batch, BatchBuilder, DomainSamples, valid_batches, valid_masking
from elle_mp.data.build import DomainData, prepare_domain
from elle_mp.data.masking import MlmMasking
from elle_mp.data.memory import check_budget, choose_memory, long_document_note
from elle_mp.data.packing import Objective
from elle_mp.data.sources import check_source, read_documents
from elle_mp.data.tokenizer import Tokenizer, train_sentencepiece
from elle_mp.errors import UserError
from elle_mp.parallel.agreement import on_first_rank_then_all
from elle_mp.train.signals import ending

RECOVER, TRAIN = "recover", "train"
PHASES = (RECOVER, TRAIN)
PROBE_ROWS = 4


def check_data(config: Config) -> None:
    """Checks every source before anything starts.

    Raises:
        UserError: a file is missing, a built-in is unknown, the memory holds no sample.
    """
    for index in range(len(config.stream)):
        try:
            check_source(config.stage_data(index))
        except UserError as error:
            raise UserError(f"stream.{index}.data: {error}") from None
    if len(config.stream) > 1:
        check_budget(config.text_length, config.memory.tokens)
    if config.tokenizer.path is not None:
        Tokenizer.load(Path(config.tokenizer.path))


@dataclass(frozen=True)
class Domains:
    """Everything that a stage reads.

    Attributes:
        train: all training samples of each domain.
        valid: its valid samples.
        memory: what is kept of its training samples once it is finished.
    """

    config: Config
    tokenizer: Tokenizer
    train: tuple[DomainSamples, ...]
    valid: tuple[DomainSamples, ...]
    memory: tuple[DomainSamples, ...]

    def builder(self, stage: int, phase: str) -> BatchBuilder:
        """The batches of one phase."""
        config = self.config
        return BatchBuilder(
            seed=config.run.seed,
            stage=stage,
            phase=PHASES.index(phase),
            new=None if phase == RECOVER else self.train[stage],
            memories=self.memory[:stage],
            replay=config.memory.replay,
            batch=config.stage_batch(stage).global_,
            masking=self._masking(config.run.seed),
        )

    def held_out(self, domain: int) -> Iterator[Batch]:
        """The valid batches of a domain: the same at every evaluation and under every layout."""
        config, tokenizer = self.config, self.tokenizer
        masking = valid_masking(
            objective_of(config),
            config.run.seed,
            tokenizer.vocab_size,
            tokenizer.mask_id,
            tokenizer.special_ids,
        )
        return valid_batches(self.valid[domain], config.batch.micro, config.eval.batches, masking)

    def probe(self, seen: int) -> Batch:
        """A few valid sequences of the domains before ``seen``: the fixed batch that growth is proved on."""
        batches = [next(iter(self.held_out(domain))) for domain in range(seen)]
        rows = [batch.rows(0, min(PROBE_ROWS, len(batch))) for batch in batches]
        return Batch(
            *(torch.cat([getattr(batch, part) for batch in rows]) for part in ("tokens", "targets", "domain", "key"))
        )

    def _masking(self, seed: int) -> MlmMasking | None:
        tokenizer = self.tokenizer
        if objective_of(self.config) == "causal":
            return None
        return MlmMasking(seed, tokenizer.vocab_size, tokenizer.mask_id, tokenizer.special_ids)


def objective_of(config: Config) -> Objective:
    """What the family predicts: the next token, or masked ones."""
    return "mlm" if config.model.family == "bert" else "causal"


def open_domains(config: Config, run_dir: Path, say: Callable[[str], None]) -> Domains:
    """Trains or loads the tokenizer and tokenises every domain, on rank 0; the other ranks read what it wrote.

    Raises:
        UserError: on every rank, whatever was wrong with the text on rank 0.
    """
    tokenizer = on_first_rank_then_all(lambda: _tokenizer(config, run_dir, say))
    train, valid, memory = [], [], []
    for index, stage in enumerate(config.stream):

        def prepare(name: str = stage.domain, data: str = config.stage_data(index)) -> DomainData:
            return prepare_domain(name, data, tokenizer, run_dir / "data")

        data = on_first_rank_then_all(prepare)
        samples = DomainSamples(index, data.packed("train", config.text_length, objective_of(config)))
        train.append(samples)
        valid.append(DomainSamples(index, data.packed("valid", config.text_length, objective_of(config))))
        if index == len(config.stream) - 1:
            break
        note = long_document_note(data.train, config.memory.tokens, stage.domain)
        if note:
            say(f"note: {note}")
        budget, seed = config.memory.tokens, config.run.seed
        chosen = choose_memory(len(samples), config.text_length, budget, seed, stage.domain)
        memory.append(replace(samples, memory=chosen))
    return Domains(config, tokenizer, tuple(train), tuple(valid), tuple(memory))


def _tokenizer(config: Config, run_dir: Path, say: Callable[[str], None]) -> Tokenizer:
    kept = run_dir / "tokenizer"
    if (kept / "tokenizer.model").is_file():
        return Tokenizer.load(kept)
    if config.tokenizer.path is not None:
        tokenizer = Tokenizer.load(Path(config.tokenizer.path))
        tokenizer.save(kept)
        return tokenizer
    say(f"training a tokenizer of {config.tokenizer.vocab_size} pieces on {config.stream[0].domain}")
    with ending(clean_up=False):
        return train_sentencepiece(
            read_documents(config.stage_data(0), "train"),
            config.tokenizer.vocab_size,
            kept,
            model_type=config.tokenizer.model_type,
            seed=config.run.seed,
        )
