"""The text of a stream: tokenizer, samples and memories of every domain, and the batches of every phase."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

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

Part = Literal["train", "valid", "memory"]


def check_data(config: Config) -> None:
    """Checks every source before anything starts.

    Raises:
        UserError: a file is missing, a built-in is unknown, the memory holds no sample, the tokenizer has more ids than
            the configuration gives the model.
    """
    for index in range(len(config.stream)):
        try:
            check_source(config.stage_data(index))
        except UserError as error:
            raise UserError(f"stream.{index}.data: {error}") from None
    if len(config.stream) > 1:
        check_budget(config.stage_text_length(len(config.stream) - 1), config.memory.tokens)
    ids = vocabulary_size(config)
    for index in range(len(config.stream)):
        given = config.stage_model(index).vocab
        if given is not None and given < ids:
            key = "model.vocab" if given == config.model.vocab else f"stream.{index}.grow.vocab"
            raise UserError(f"{key}={given} is smaller than the {ids} ids of the tokenizer; {ids} or more would do")


def vocabulary_size(config: Config) -> int:
    """Ids of the run's tokenizer, as it is or as it will be trained.

    Raises:
        UserError: there is none at ``tokenizer.path``.
    """
    path = config.tokenizer.path
    return config.tokenizer.vocab_size if path is None else Tokenizer.load(Path(path)).vocab_size


@dataclass(frozen=True)
class Domains:
    """Everything that a stage reads.

    All text of a stage, that of earlier domains too, is cut into samples of its text length. Where a growth of
    ``seq_len`` changes it, the memories of earlier domains are chosen anew among the longer samples of their whole
    training text: by the same rule, of as many tokens, but they are not the tokens kept before.

    Attributes:
        data: the tokenised text of each domain.
    """

    config: Config
    tokenizer: Tokenizer
    data: tuple[DomainData, ...]
    _cut: dict[tuple[Part, int, int], DomainSamples] = field(default_factory=dict, repr=False, compare=False)

    def text_length(self, stage: int) -> int:
        """Text positions of a sequence in a stage."""
        return self.config.stage_text_length(stage)

    def samples(self, part: Part, domain: int, stage: int) -> DomainSamples:
        """All training samples of a domain as long as the text of ``stage``, its valid samples, or its memory.

        Raises:
            UserError: the domain has too little text for one.
        """
        place = part, domain, self.text_length(stage)
        if place not in self._cut:
            self._cut[place] = self._cut_anew(*place)
        return self._cut[place]

    def _cut_anew(self, part: Part, domain: int, length: int) -> DomainSamples:
        config = self.config
        split = "valid" if part == "valid" else "train"
        packed = self.data[domain].packed(split, length, objective_of(config))
        if part != "memory":
            return DomainSamples(domain, packed)
        name, budget = config.stream[domain].domain, config.memory.tokens
        return DomainSamples(domain, packed, choose_memory(len(packed), length, budget, config.run.seed, name))

    def builder(self, stage: int, phase: str) -> BatchBuilder:
        """The batches of one phase."""
        config = self.config
        return BatchBuilder(
            seed=config.run.seed,
            stage=stage,
            phase=PHASES.index(phase),
            new=None if phase == RECOVER else self.samples("train", stage, stage),
            memories=[self.samples("memory", domain, stage) for domain in range(stage)],
            replay=config.memory.replay,
            batch=config.stage_batch(stage).global_,
            masking=self._masking(config.run.seed),
        )

    def held_out(self, domain: int, stage: int) -> Iterator[Batch]:
        """The valid batches of a domain, as long as the text of ``stage``: the same at every evaluation and under
        every layout."""
        config, tokenizer = self.config, self.tokenizer
        masking = valid_masking(
            objective_of(config),
            config.run.seed,
            tokenizer.vocab_size,
            tokenizer.mask_id,
            tokenizer.special_ids,
        )
        return valid_batches(self.samples("valid", domain, stage), config.batch.micro, config.eval.batches, masking)

    def probe(self, seen: int) -> Batch:
        """A few valid sequences of the domains before ``seen``, as long as before the growth that is proved on them."""
        batches = [next(iter(self.held_out(domain, seen - 1))) for domain in range(seen)]
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
    prepared: list[DomainData] = []
    for index, stage in enumerate(config.stream):

        def prepare(name: str = stage.domain, data: str = config.stage_data(index)) -> DomainData:
            return prepare_domain(name, data, tokenizer, run_dir / "data")

        data = on_first_rank_then_all(prepare)
        prepared.append(data)
        # Too little text is an error now and not in the stage that needs longer samples of it.
        for length in {config.stage_text_length(later) for later in range(index, len(config.stream))}:
            for split in ("train", "valid"):
                data.packed(split, length, objective_of(config))
        last = index == len(config.stream) - 1
        note = None if last else long_document_note(data.train, config.memory.tokens, stage.domain)
        if note:
            say(f"note: {note}")
    return Domains(config, tokenizer, tuple(prepared))


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
