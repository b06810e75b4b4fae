"""``elle-mp evaluate``: perplexity of each domain under a checkpoint, AP and AP+."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import yaml

from elle_mp.checkpoint.store import CheckpointStore
from elle_mp.config import Config, ParallelConfig
from elle_mp.config_file import parse_config
from elle_mp.data.batches import DomainSamples, valid_batches, valid_masking
from elle_mp.data.build import prepare_domain
from elle_mp.data.tokenizer import Tokenizer
from elle_mp.errors import UserError
from elle_mp.models.build import Precision, empty_model
from elle_mp.models.pipeline import LanguageModel
from elle_mp.models.spec import ModelSpec
from elle_mp.observe.metrics import write_json
from elle_mp.observe.tables import evaluation_table, make_console
from elle_mp.parallel.agreement import on_first_rank, on_first_rank_then_all
from elle_mp.parallel.mesh import make_grid, start_distributed
from elle_mp.stream.domains import objective_of
from elle_mp.stream.evaluation import perplexity
from elle_mp.stream.lifelong import average_increased_perplexity, average_perplexity
from elle_mp.stream.state import RunState


def evaluate(checkpoint: Path, data: list[str], json_file: Path | None) -> None:
    """Prints perplexities of the valid text of every ``DOMAIN=PATH``, in the masters' precision.

    A domain that the run has learned is read with its own prompt; any other with that of the last learned domain.

    Raises:
        UserError: no checkpoint there, or data that cannot be read.
    """
    run_dir, name = find_checkpoint(checkpoint)
    pairs = [_pair(item) for item in data]
    device = start_distributed()
    console = make_console(dist.get_rank() == 0)
    try:
        config = run_config(run_dir)
        store = CheckpointStore(run_dir / "checkpoints")
        meta = store.meta(name)
        state = RunState.from_json(meta["state"])
        model = _load_model(store, name, ModelSpec.from_json(meta["model"]), config, device)
        tokenizer = Tokenizer.load(run_dir / "tokenizer")
        learned = [stage.domain for stage in config.stream]
        last = min(state.stage, len(learned) - 1)
        ppl: dict[str, float] = {}
        for domain, path in pairs:
            row = learned.index(domain) if domain in learned else max(last - (state.phase == "begin"), 0)
            if domain not in learned:
                console.print(f"note: the run has no domain {domain!r}; read with the prompt of {learned[row]!r}")
            ppl[domain] = domain_perplexity(
                model, config, tokenizer, run_dir, domain, path, row, model.spec.text_length
            )
        finished = state.finished_ppl
        scores = {
            "ppl": ppl,
            "ap": average_perplexity(ppl),
            "ap_plus": average_increased_perplexity(ppl, finished, list(finished)[-1] if finished else ""),
        }
        console.print(evaluation_table(scores))
        if json_file is not None:
            on_first_rank(lambda: write_json(json_file, scores))
    finally:
        dist.destroy_process_group()


def find_checkpoint(path: Path) -> tuple[Path, str]:
    """The run directory and the name of a checkpoint given as a run directory or as a checkpoint's folder.

    Raises:
        UserError: there is none.
    """
    if (path / "checkpoints").is_dir():
        name = CheckpointStore(path / "checkpoints").latest()
        if name is None:
            raise UserError(f"{path}: the run has no complete checkpoint yet")
        return path, name
    if path.parent.name == "checkpoints" and path.is_dir():
        return path.parent.parent, path.name
    raise UserError(f"{path}: no checkpoint; give a run directory or RUN/checkpoints/NAME")


def _pair(item: str) -> tuple[str, str]:
    domain, equals, path = item.partition("=")
    if not (domain and equals and path):
        raise UserError(f"--data {item}: give it as DOMAIN=PATH")
    return domain, path


def run_config(run_dir: Path) -> Config:
    """The configuration that a run directory keeps.

    Raises:
        UserError: it is missing.
    """
    saved = run_dir / "config.yaml"
    if not saved.is_file():
        raise UserError(f"{saved} is missing: the run's configuration says how to read its checkpoint")
    return parse_config(yaml.safe_load(saved.read_text(encoding="utf-8")), str(saved))


def _load_model(
    store: CheckpointStore, name: str, spec: ModelSpec, config: Config, device: torch.device
) -> LanguageModel:
    """The model alone, sharded over all ranks; the optimizer's tensors of the checkpoint are not read."""
    grid = make_grid(ParallelConfig(dp_shard=dist.get_world_size()), device)
    model = empty_model(spec, grid, Precision.named(config.precision).checking)
    tensors = {f"model.{key}": item.detach() for key, item in model.named_parameters()}
    if model.norm_stats is not None:
        tensors["model.norm_stats"] = model.norm_stats
    store.load(name, tensors, partial=True)
    return model.eval()


def domain_perplexity(
    model: LanguageModel,
    config: Config,
    tokenizer: Tokenizer,
    run_dir: Path,
    domain: str,
    path: str,
    row: int,
    length: int,
) -> float:
    """Perplexity of the valid text of a domain, in samples of ``length`` text tokens, with the prompt ``row``."""
    data = on_first_rank_then_all(lambda: prepare_domain(domain, path, tokenizer, run_dir / "data"))
    samples = DomainSamples(row, data.packed("valid", length, objective_of(config)))
    masking = valid_masking(
        objective_of(config), config.run.seed, tokenizer.vocab_size, tokenizer.mask_id, tokenizer.special_ids
    )
    return perplexity(model, valid_batches(samples, config.batch.micro, config.eval.batches, masking))
