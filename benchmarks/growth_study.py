"""Which growth strategy is worth most: loss against training FLOPs, the source model and recovery counted.

    python benchmarks/growth_study.py DATA [--seeds 1 2 3] [--arms gpt/width1.5 ...] [--quick] [--out FILE.md]

DATA holds ``wb news reviews bio cs`` folders with ``train.jsonl`` and ``valid.jsonl``; all text is their even mix. For
each family and seed one source model is trained. Each arm grows it to the target size of its group and goes on with
the same batches for the same number of steps, so that arms of a group end after equal training FLOPs. Two more arms
end there too: ``from scratch`` at the target size, and ``not grown``, the source trained on.

The learning rate is constant after a warm-up until the growth. Then it warms up again, as ``optim.restart: phase``
does, and falls linearly to zero. ``from scratch`` and ``not grown`` have the same course over FLOPs without the second
warm-up. Arms called ``recovery`` give a fifth of their steps to recovery, at a rate that stays high, and drop the
optimizer's state after it. ``not grown, equal tokens`` ends earlier than its group: after as many steps. Losses are
those of fixed held-out text in fp32; training computes in bf16 with fp32 masters, on one thread.

Every finished arm is one JSON file in ``--runs`` and is not run again; growth_study_report.py draws and tabulates them.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from math import log
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from growth_study_arms import EQUAL_TOKENS, FROM_SCRATCH, NOT_GROWN, SOURCES, TARGETS, Arm, Settings, arms_by_tier
from growth_study_report import write_report
from torch import Tensor

from elle_mp.config import Config, GrowConfig, GrowthConfig, ModelConfig, OptimConfig, ParallelConfig, grown
from elle_mp.data.batches import Batch, BatchBuilder, DomainSamples, valid_batches, valid_masking
from elle_mp.data.build import prepare_domain
from elle_mp.data.files import write_whole
from elle_mp.data.masking import MlmMasking
from elle_mp.data.packing import Objective
from elle_mp.data.sources import read_documents
from elle_mp.data.tokenizer import Tokenizer, train_sentencepiece
from elle_mp.errors import UserError
from elle_mp.growth.plan import make_plan
from elle_mp.models.build import Precision, checking_copy, empty_model
from elle_mp.models.flops import parameter_count, training_flops_per_token
from elle_mp.models.live import anneal_norms, settle_norms
from elle_mp.models.spec import ModelSpec
from elle_mp.models.transformer import Transformer
from elle_mp.parallel.mesh import Grid, make_grid, start_distributed
from elle_mp.parallel.sharding import initialise, local_tensor
from elle_mp.stream.evaluation import perplexity
from elle_mp.stream.growing import Before, grow, measure, prove
from elle_mp.train.optimizer import ShardedAdamW
from elle_mp.train.rates import after_growth, rewarm_factor
from elle_mp.train.schedules import rate_factor
from elle_mp.train.trainer import Trainer, check_finite

ROOT = Path(__file__).resolve().parent.parent
DOMAINS = ("wb", "news", "reviews", "bio", "cs")
PRECISION = Precision.named("bf16")


class Text:
    """The mix of the five domains: training batches that every arm of a seed shares, and fixed held-out ones."""

    def __init__(self, data: Path, runs: Path, settings: Settings) -> None:
        self.settings = settings
        folder = runs / "tokenizer"
        kept = (folder / "tokenizer.model").is_file()
        self.tokenizer = (
            Tokenizer.load(folder) if kept else train_sentencepiece(_mixed(data), settings.vocab, folder, "unigram")
        )
        self.domains = [prepare_domain(name, str(data / name), self.tokenizer, runs / "data") for name in DOMAINS]

    def builder(self, family: str, seed: int) -> BatchBuilder:
        """Batches in which the domains take turns."""
        tokenizer = self.tokenizer
        masking = (
            MlmMasking(seed, tokenizer.vocab_size, tokenizer.mask_id, tokenizer.special_ids)
            if family == "bert"
            else None
        )
        return BatchBuilder(
            seed=seed,
            stage=0,
            phase=0,
            new=None,
            memories=self._samples("train", family),
            replay=0.0,
            batch=self.settings.batch,
            masking=masking,
        )

    def held_out(self, family: str) -> Iterator[Batch]:
        """The same sequences of valid text for all arms."""
        tokenizer = self.tokenizer
        masking = valid_masking(_objective(family), 1, tokenizer.vocab_size, tokenizer.mask_id, tokenizer.special_ids)
        for samples in self._samples("valid", family):
            yield from valid_batches(samples, self.settings.valid_rows, 2 if family == "bert" else 1, masking)

    def probe(self, family: str) -> Batch:
        """A few held-out sequences on which logits are compared."""
        return next(self.held_out(family)).rows(0, 8)

    def _samples(self, split: str, family: str) -> list[DomainSamples]:
        length, objective = self.settings.seq_len, _objective(family)
        return [DomainSamples(row, item.packed(split, length, objective)) for row, item in enumerate(self.domains)]


def _objective(family: str) -> Objective:
    return "mlm" if family == "bert" else "causal"


def _mixed(data: Path) -> Iterator[str]:
    for documents in zip(*(islice(read_documents(str(data / name), "train"), 2000) for name in DOMAINS), strict=False):
        yield from documents


@dataclass
class Run:
    """A model in training, and what it has cost and reached."""

    family: str
    model: Transformer
    optimizer: ShardedAdamW
    every: int
    """Steps between evaluations."""
    step: int = 0
    flops: float = 0.0
    points: list[tuple[float, int, float]] = field(default_factory=list)
    """(training FLOPs so far, steps so far, held-out loss)."""


class Study:
    """Trains sources and arms, one at a time."""

    def __init__(self, text: Text, runs: Path, settings: Settings) -> None:
        self.text, self.runs, self.settings = text, runs, settings
        torch.set_num_threads(1)
        self.grid: Grid = make_grid(ParallelConfig(), start_distributed())
        self.optim = OptimConfig(schedule="linear", warmup=0.08)

    def known(self, arm: Arm, seed: int) -> dict[str, Any] | None:
        """The result of an arm from its file, when there is one of these settings."""
        path = self._path(arm, seed)
        if not path.is_file():
            return None
        known: dict[str, Any] = json.loads(path.read_text())
        return known if all(known[key] == value for key, value in self._about(arm).items()) else None

    def result(self, arm: Arm, seed: int) -> dict[str, Any]:
        """The result of an arm, kept in its file."""
        known = self.known(arm, seed)
        if known is not None:
            return known
        began = time.perf_counter()
        about = self._about(arm) | {"family": arm.family, "group": arm.group, "arm": arm.name, "seed": seed}
        try:
            about |= self._run(arm, seed)
        except UserError as error:
            about |= {"failed": str(error), "points": []}
        about["seconds"] = time.perf_counter() - began
        path = self._path(arm, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, (json.dumps(about, indent=1) + "\n").encode())
        return about

    def _path(self, arm: Arm, seed: int) -> Path:
        return self.runs / arm.key.replace(", ", "-").replace(" ", "_") / f"{seed}.json"

    def _about(self, arm: Arm) -> dict[str, Any]:
        return {
            "settings": asdict(self.settings),
            "growth": dict(arm.growth),
            "target": self._grow(arm),
        }

    def _run(self, arm: Arm, seed: int) -> dict[str, Any]:
        if arm.name == FROM_SCRATCH:
            return self._from_scratch(arm, seed)
        source = self._source(arm.family, seed)
        start = {"source_flops": source.flops, "before": source.points[-1][2]}
        if arm.name in (NOT_GROWN, EQUAL_TOKENS):
            steps = self._steps(arm)
            if arm.name == NOT_GROWN:
                steps = round(steps * self._cost(self._target(arm)) / self._cost(source.model.spec))
            source.every *= arm.longer
            self._train(source, seed, [rate_factor(self._falling, step, steps) for step in range(steps)])
            return start | {"points": source.points, "params": parameter_count(source.model.spec)}
        return start | self._grown(arm, seed, source)

    @property
    def _falling(self) -> OptimConfig:
        return self.optim.model_copy(update={"warmup": 0.0})

    def _optim(self, family: str) -> OptimConfig:
        return self.optim.model_copy(update={"lr": self.settings.rate(family)})

    def _grow(self, arm: Arm) -> dict[str, Any]:
        return TARGETS[arm.family, arm.group]

    def _sizes(self, family: str) -> ModelConfig:
        return ModelConfig.model_validate({"family": family, "seq_len": self.settings.seq_len, **SOURCES[family]})

    def _spec(self, sizes: ModelConfig) -> ModelSpec:
        stages = [{"domain": name, "data": "none", "steps": 1} for name in DOMAINS]
        config = Config.model_validate({"model": sizes, "prompts": {"tokens": 0}, "stream": stages})
        return ModelSpec.from_config(config, self.text.tokenizer.vocab_size)

    def _cost(self, spec: ModelSpec) -> float:
        """Training FLOPs of a step."""
        return training_flops_per_token(spec) * spec.positions * self.settings.batch

    def _steps(self, arm: Arm) -> int:
        """Steps after the growth."""
        return self.settings.steps * arm.longer

    def _target(self, arm: Arm) -> ModelSpec:
        """The larger model, as made from scratch."""
        return self._spec(grown(self._sizes(arm.family), GrowConfig.model_validate(self._grow(arm))))

    def _fresh(self, sizes: ModelConfig, seed: int) -> Run:
        model = empty_model(self._spec(sizes), self.grid, PRECISION)
        initialise(model, seed)
        return Run(sizes.family, model, ShardedAdamW(model, self._optim(sizes.family)), self.settings.every)

    def _source(self, family: str, seed: int) -> Run:
        """The trained source model, kept in a file for the other arms."""
        run = self._fresh(self._sizes(family), seed)
        path = (
            self.runs / "sources" / f"{family}-{seed}-{self.settings.source(family)}-{self.settings.rate(family):g}.pt"
        )
        if path.is_file():
            kept = torch.load(path, weights_only=True)
            for name, tensor in _tensors(run).items():
                tensor.copy_(kept["tensors"][name])
            run.step, run.flops, run.points = kept["step"], kept["flops"], [tuple(item) for item in kept["points"]]
            return run
        steps = self.settings.source(family)
        self._train(run, seed, [min(1.0, (step + 1) / self._warm(family)) for step in range(steps)])
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {"tensors": _tensors(run), "step": run.step, "flops": run.flops, "points": run.points}
        torch.save(kept, path.with_suffix(".writing"))
        path.with_suffix(".writing").rename(path)
        return run

    def _warm(self, family: str) -> int:
        return max(1, round(self.optim.warmup * self.settings.source(family)))

    def _from_scratch(self, arm: Arm, seed: int) -> dict[str, Any]:
        sizes = self._sizes(arm.family)
        source = self.settings.source(arm.family) * self._cost(self._spec(sizes))
        run = self._fresh(grown(sizes, GrowConfig.model_validate(self._grow(arm))), seed)
        cost = self._cost(run.model.spec)
        flat, steps = round(source / cost), round(source / cost) + self._steps(arm)
        factors = [
            min(1.0, (step + 1) / self._warm(arm.family)) * min(1.0, 1 - (step - flat) / (steps - flat))
            for step in range(steps)
        ]
        self._train(run, seed, factors)
        return {"points": run.points, "params": parameter_count(run.model.spec), "source_flops": source}

    def _grown(self, arm: Arm, seed: int, source: Run) -> dict[str, Any]:
        growth = GrowthConfig.model_validate({"rewarm_steps": self.settings.rewarm_steps, **arm.growth})
        family = arm.family
        sizes = grown(self._sizes(family), GrowConfig.model_validate(self._grow(arm)))
        plan = make_plan(source.model.spec, sizes, growth, seed)
        probe = self.text.probe(family)

        def mix(model: Transformer) -> dict[str, float]:
            return {"mix": perplexity(model, self.text.held_out(family))}

        before: Before = measure(source.optimizer, PRECISION, probe, mix)
        larger = grow(plan, [plan], source.optimizer, self._optim(family), PRECISION)
        record = prove(plan, before, larger, PRECISION, probe, mix)
        run = Run(
            family,
            larger.optimizer.model,
            larger.optimizer,
            source.every * arm.longer,
            source.step,
            source.flops,
            list(source.points),
        )
        run.points.append((run.flops, run.step, log(record["ppl_after"]["mix"])))
        steps = self._steps(arm)
        recovery = steps // 5 if arm.recovers else 0
        if recovery:
            # The paper cuts the schedule of recovery short: the rate warms up and stays high.
            self._train(
                run, seed, [rate_factor(self.optim, step, steps) for step in range(recovery)], growth, plan.rate
            )
            if plan.moments == "reset":
                run.optimizer.reset()
        rest = steps - recovery
        factors = [rate_factor(self.optim, step, rest) for step in range(rest)]
        self._train(run, seed, factors, growth, plan.rate, since=recovery)
        return {
            "points": run.points,
            "params": parameter_count(run.model.spec),
            "plan": {key: record[key] for key in ("width", "depth", "moments", "rate", "noise_db", "exact", "reason")},
            "after": log(record["ppl_after"]["mix"]),
            "max_logit_diff_rel": record["max_logit_diff_rel"],
        }

    def _train(
        self,
        run: Run,
        seed: int,
        factors: Sequence[float],
        growth: GrowthConfig | None = None,
        rate: str = "keep",
        since: int = 0,
    ) -> None:
        """A step for each factor of the peak rate, with an evaluation every few steps and at the end.

        Args:
            growth: what holds after a growth, ``since`` steps ago by the strategy ``rate``; ``None`` without one.
        """
        settings, builder = self.settings, self.text.builder(run.family, seed)
        trainer = Trainer(run.model, run.optimizer, settings.batch, seed)
        cost = self._cost(run.model.spec)
        for done, factor in enumerate(factors, start=1):
            age = since + done - 1
            after = after_growth("keep", 1, 0, None)
            if growth is not None:
                factor *= rewarm_factor(rate, age, growth.rewarm_steps)
                after = after_growth(rate, growth.rewarm_steps, growth.freeze_old, age)
                if growth.anneal:
                    anneal_norms(run.model, max(growth.anneal - age, 1))
                    settle_norms(run.model)
            result = trainer.step(builder.batch(run.step), factor, after=after)
            check_finite(result, f"{run.family}, step {run.step}")
            run.step += 1
            run.flops += cost
            if (since + done) % run.every == 0 or done == len(factors):
                run.points.append((run.flops, run.step, self._loss(run)))

    def _loss(self, run: Run) -> float:
        return log(perplexity(checking_copy(run.model, PRECISION), self.text.held_out(run.family)))


def _tensors(run: Run) -> dict[str, Tensor]:
    """This rank's weights and moments, by name."""
    weights = {f"model.{name}": local_tensor(item).detach() for name, item in run.model.named_parameters()}
    return weights | {f"optim.{name}": local_tensor(item) for name, item in run.optimizer.tensors().items()}


def main() -> None:
    """Runs the arms that are not there yet, and writes the report after each tier."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--arms", nargs="+", default=[""], help="beginnings of FAMILY/GROUP/ARM; all when not given")
    parser.add_argument("--tiers", type=int, default=5, help="how many of the tiers of arms; the last has longer arms")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "growth-study")
    parser.add_argument("--out", type=Path, help="write FILE.md, and FILE.svg beside it")
    parser.add_argument("--notes", type=Path, help="text to put in front of the tables of FILE.md")
    parser.add_argument("--quick", action="store_true", help="one seed and a few steps: shows that every arm runs")
    parser.add_argument("--lr", type=float, default=Settings.lr)
    parser.add_argument("--report", action="store_true", help="run nothing: the report of what is there")
    options = parser.parse_args()
    settings = Settings(lr=options.lr)
    seeds, runs = options.seeds, options.runs
    if options.quick:
        settings = Settings(lr=options.lr, source_steps=12, bert_source_steps=12, steps=10, every=5, valid_rows=8)
        seeds, runs = options.seeds[:1], options.runs / "quick"
    study = Study(Text(options.data, options.runs, settings), runs, settings)
    results: list[dict[str, Any]] = []
    for tier in arms_by_tier()[: options.tiers]:
        chosen = [arm for arm in tier if any(arm.key.startswith(name) for name in options.arms)]
        for seed in seeds:
            for arm in chosen:
                if options.report and not study.known(arm, seed):
                    continue
                result = study.result(arm, seed)
                results.append(result)
                end = result["points"][-1][2] if result["points"] else float("nan")
                print(
                    f"{arm.key} seed {seed}: {end:.4f} {result.get('failed', '')} {result['seconds']:.1f} s", flush=True
                )
        if not options.report:
            print(write_report(results, asdict(settings)), flush=True)
    text = write_report(results, asdict(settings), options.notes, options.out)
    if options.report:
        print(text)


if __name__ == "__main__":
    main()
