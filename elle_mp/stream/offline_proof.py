"""Proves an offline growth: logits on a fixed batch in fp64, and perplexities of finished domains, before and after."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from elle_mp.checkpoint.store import CheckpointStore
from elle_mp.checkpoint.stream_reader import StoredTensors
from elle_mp.config import Config
from elle_mp.data.batches import Batch
from elle_mp.data.sources import check_source
from elle_mp.data.tokenizer import Tokenizer
from elle_mp.errors import UserError
from elle_mp.growth.plan import GrowthPlan
from elle_mp.models.pipeline import LanguageModel
from elle_mp.models.spec import ModelSpec
from elle_mp.observe.tables import growth_table
from elle_mp.ops.random import words
from elle_mp.parallel.agreement import on_first_rank
from elle_mp.stream.evaluate_command import domain_perplexity
from elle_mp.stream.evaluation import fixed_logits, largest_difference
from elle_mp.stream.growing import check_proof
from elle_mp.stream.memory import largest_resident
from elle_mp.stream.state import RunState
from elle_mp.stream.stored_model import stored_model, streaming_bytes

ROWS, LONGEST = 4, 64
DOUBLE = torch.float64


def prove_offline(
    config: Config,
    run_dir: Path,
    meta: Mapping[str, Any],
    source: StoredTensors,
    out: Path,
    limit: int,
    console: Console,
) -> None:
    """Runs both checkpoints, prints the comparison, and keeps it in the new checkpoint's growth record.

    Logits are taken in fp64, one layer at a time; perplexities as trained, and only where all weights fit.

    Raises:
        UserError: the plan said that it is exact, and the logits differ.
    """
    store = CheckpointStore(out / "checkpoints")
    name = store.latest()
    if name is None:
        raise RuntimeError("the grown checkpoint is not there")
    new_meta = store.meta(name)
    state = RunState.from_json(new_meta["state"])
    record = dict(state.growth or {})
    old_spec, new_spec = ModelSpec.from_json(meta["model"]), ModelSpec.from_json(new_meta["model"])
    batch = fixed_batch(old_spec, config.run.seed)
    measures = _perplexities(config, run_dir, old_spec, state, console)
    grown = StoredTensors(out / "checkpoints" / name)
    fits = largest_resident() + streaming_bytes(new_spec, ROWS * LONGEST) + _weights_bytes(grown) < limit
    if not fits and measures is not None:
        console.print("note: the weights do not fit --max-memory: logits are compared, perplexities not")
        measures = None
    before, ppl_before = _measure(old_spec, source, batch, measures)[:2]
    after, ppl_after, model = _measure(new_spec, grown, batch, measures)
    absolute, relative = largest_difference(before, after[..., : before.shape[-1]], model)
    record |= {
        "max_logit_diff": absolute,
        "max_logit_diff_rel": relative,
        "ppl_before": ppl_before,
        "ppl_after": ppl_after,
    }
    try:
        check_proof(record)
    except UserError:
        on_first_rank(lambda: shutil.rmtree(out / "checkpoints" / name))  # a wrong checkpoint must not be used
        raise
    state.growth = record
    on_first_rank(lambda: store.set_meta(name, new_meta | {"state": state.to_json()}))
    console.print(growth_table({"stages": [{"domain": name, "growth": record}]}))


def check_proof_memory(plan: GrowthPlan, limit: int) -> None:
    """Refuses a limit that not even the model's tables and one layer fit. Collective.

    Raises:
        UserError: says what would do.
    """
    needed = largest_resident() + streaming_bytes(plan.new, ROWS * LONGEST)
    if needed > limit:
        least = -(-needed // (1 << 20))
        raise UserError(f"--max-memory: the tables and one layer of the model in fp64 need {least}M for --verify")


def fixed_batch(spec: ModelSpec, seed: int) -> Batch:
    """A few sequences of seeded random ids, one for each domain in turn: what every checkpoint can be run on."""
    length = min(spec.text_length, LONGEST)
    drawn = words(seed, "growth/proof", 0, ROWS * length) % spec.softmax_vocab
    tokens = torch.from_numpy(drawn.astype("int64")).view(ROWS, length)
    return Batch(tokens, tokens, torch.arange(ROWS) % max(spec.domains, 1), torch.arange(ROWS))


def _measure(
    spec: ModelSpec,
    tensors: StoredTensors,
    batch: Batch,
    measures: Callable[[LanguageModel], dict[str, float]] | None,
) -> tuple[torch.Tensor, dict[str, float], LanguageModel]:
    """Logits of ``batch`` in fp64, and perplexities in the masters' precision: they read far more text."""
    masters = tensors.tensors["model.token_table"][1]
    model = stored_model(spec, tensors, DOUBLE, resident=False)
    logits = fixed_logits(model, batch)
    ppl = {} if measures is None else measures(stored_model(spec, tensors, masters, resident=True))
    return logits, ppl, model


def _perplexities(
    config: Config, run_dir: Path, spec: ModelSpec, state: RunState, console: Console
) -> Callable[[LanguageModel], dict[str, float]] | None:
    """Perplexity of each finished domain, on the text of the run at the old model's length, where it can be read."""
    finished = len(state.stages)
    if not finished or not (run_dir / "tokenizer").is_dir():
        return None
    tokenizer = Tokenizer.load(run_dir / "tokenizer")
    length = spec.text_length

    def measure(model: LanguageModel) -> dict[str, float]:
        out = {}
        for index in range(finished):
            domain, data = config.stream[index].domain, config.stage_data(index)
            out[domain] = domain_perplexity(model, config, tokenizer, run_dir, domain, data, index, length)
        return out

    try:
        for index in range(finished):
            check_source(config.stage_data(index))
    except UserError as error:
        console.print(f"note: no perplexities: {error}")
        return None
    return measure


def _weights_bytes(tensors: StoredTensors) -> int:
    """Bytes of the weights in fp64: twice those that are held, for what reading makes."""
    return sum(prod(shape) * 8 for name, (shape, _) in tensors.tensors.items() if name.startswith("model."))
