"""The stages of a lifelong run: grow, recover, train, evaluate; saved and resumed anywhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from elle_mp.checkpoint.agreement import background_group
from elle_mp.checkpoint.store import CheckpointStore
from elle_mp.config import Config, OptimConfig
from elle_mp.errors import UserError
from elle_mp.growth.factors import After
from elle_mp.growth.plan import GrowthPlan, make_plan
from elle_mp.models.build import Precision
from elle_mp.models.costs import measure_costs
from elle_mp.models.flops import parameter_count, training_flops_per_token
from elle_mp.models.live import anneal_norms, open_vocabulary, settle_norms
from elle_mp.models.pipeline import LanguageModel
from elle_mp.models.spec import ModelSpec
from elle_mp.observe.journal import Journal, Place
from elle_mp.parallel.agreement import on_first_rank
from elle_mp.parallel.mesh import AXES, Grid, make_grid
from elle_mp.parallel.time_limits import TimeLimits
from elle_mp.stream.domains import RECOVER, TRAIN, Domains
from elle_mp.stream.evaluation import perplexity
from elle_mp.stream.growing import Perplexities, grow, left_by, measure, prove
from elle_mp.stream.idle import WaitingRoom
from elle_mp.stream.lifelong import average_increased_perplexity, average_perplexity
from elle_mp.stream.run_directory import restore_results
from elle_mp.stream.splitting import remembered_costs, split_line, split_record, wants_costs
from elle_mp.stream.state import BEGIN, DONE, RunState
from elle_mp.train.engine import make_optimizer
from elle_mp.train.equality import EqualityCheck
from elle_mp.train.optimizer import ShardedAdamW
from elle_mp.train.rates import after_growth, rewarm_factor
from elle_mp.train.schedules import rate_factor
from elle_mp.train.signals import StopRequest
from elle_mp.train.trainer import StepResult, Trainer, check_finite, rows_of


class StreamRunner:
    """Runs a stream from where its run directory stands.

    Attributes:
        state: the position, and all that has been measured.
    """

    def __init__(
        self,
        config: Config,
        domains: Domains,
        run_dir: Path,
        device: torch.device,
        journal: Journal,
        limits: TimeLimits,
    ) -> None:
        self.config = config
        self.domains = domains
        self.run_dir = run_dir
        self.store = CheckpointStore(run_dir / "checkpoints")
        self.device = device
        self.journal = journal
        self.limits = limits
        self.precision = Precision.named(config.precision)
        self.state = RunState()
        self.saved_at = -1
        self.check_equal = EqualityCheck()
        self.trouble: UserError | None = None
        self.waiting_room = WaitingRoom()
        self._open()

    def run(self) -> bool:
        """Goes on to the end of the stream.

        Returns:
            False when a signal asked to stop before: the run is saved and can be resumed.
        """
        with StopRequest() as stop, self._closing_store():
            while self.state.phase != DONE:
                self._change_layout()
                asked = self._run_stage(stop) if self.grid.active else False
                self.store.wait()
                self.state, asked = self.waiting_room.meet(self.grid, self.state, asked)
                self.saved_at = self.state.global_step
                if asked and self.state.phase != DONE:
                    return False
        return True

    @contextmanager
    def _closing_store(self) -> Iterator[None]:
        """A run that ends by an error lets a save in the background end first: it needs the process group."""
        try:
            yield
        except BaseException:
            self.store.close()
            raise

    def _run_stage(self, stop: StopRequest) -> bool:
        """Goes on to the end of the stage, or until asked to stop, which is what it returns."""
        if self.state.phase == BEGIN:
            began = time.perf_counter()
            self._begin_stage()
            self.state.stage_seconds += time.perf_counter() - began
        split = split_record(self.model)
        if split is not None and split != self.state.split:
            self.journal.say(split_line(self.config.stream[self.state.stage].domain, split))
        self.state.split = split
        while True:
            asked = self._train_phase(stop)
            if self.state.step == self._phase_steps(self.state.stage, self.state.phase):
                self._finish_phase()
            elif self.saved_at != self.state.global_step:
                self._save()
            if asked or self.state.phase in (BEGIN, DONE):
                return asked

    # Start and resume

    def _open(self) -> None:
        name = self.store.latest()
        if name is None:
            self._layout(0)
            if self.grid.active:
                spec = ModelSpec.from_config(self.config, self.domains.tokenizer.vocab_size)
                self._share_out(spec, 0)
                self._make(spec)
                self.optimizer.initialise(self.config.run.seed)
            on_first_rank(lambda: self.journal.start(0))
            return
        meta = self.store.meta(name)
        self.state = RunState.from_json(meta["state"])
        self._load(name, max(self.state.stage - (self.state.phase in (BEGIN, DONE)), 0))
        self.saved_at = self.state.global_step
        on_first_rank(lambda: self.journal.start(self.state.global_step))
        on_first_rank(lambda: restore_results(self.run_dir, self.state))
        self.journal.say(f"going on from checkpoint {name}")

    def _layout(self, stage: int) -> None:
        self.stage_of_layout = stage
        self.grid: Grid = make_grid(self.config.stage_parallel(stage), self.device)
        aside = background_group(self.grid.members) if self.config.checkpoint.background else None
        self.store = CheckpointStore(self.store.folder, self.grid.everyone, aside)
        self.limits.use(self.grid.parallel)

    def _share_out(self, spec: ModelSpec, stage: int, record: dict[str, Any] | None = None) -> None:
        """Has the grid know how the layers of a stage's model are shared out: as a checkpoint's ``record`` says, or by
        what the first micro-batch takes, if that is asked for."""
        if not wants_costs(self.grid):
            return
        batch = self.config.stage_batch(stage)
        first, last = rows_of(self.grid, batch.global_)
        rows = self.domains.builder(stage, TRAIN).batch(0, first, min(last, first + batch.micro))
        known = remembered_costs(self.grid, record)
        costs = known or measure_costs(spec, self.grid, self.precision, rows, self.config.run.seed)
        self.grid = replace(self.grid, costs=costs)

    def _make(self, spec: ModelSpec) -> None:
        optim = self.config.stage_optim(self.stage_of_layout)
        self.optimizer: ShardedAdamW = make_optimizer(spec, self.grid, self.precision, optim, left_by(self._lineage()))

    @property
    def model(self) -> LanguageModel:
        """The model that is trained."""
        return self.optimizer.model

    def _lineage(self) -> list[GrowthPlan]:
        """Every growth that the model has been through."""
        return [GrowthPlan.from_json(plan) for plan in self.state.lineage]

    def _load(self, name: str, stage: int) -> None:
        """Builds the model of a checkpoint under the layout of ``stage`` and fills it, on ranks with a place there."""
        old: ShardedAdamW | None = vars(self).pop("optimizer", None)
        if old is not None:
            old.release()
            self.grid.close()
            self.store.leave()
        self._layout(stage)
        if not self.grid.active:
            return
        spec = ModelSpec.from_json(self.store.meta(name)["model"])
        if self.state.phase not in (BEGIN, DONE):  # else another split comes before the next step
            self._share_out(spec, stage, self.state.split)
        self._make(spec)
        self.store.load(name, self._tensors())
        self.optimizer.loaded()

    def _tensors(self) -> dict[str, Any]:
        # The optimizer's are always the sharded masters; the model's may be gathered copies in the compute dtype.
        tensors: dict[str, Any] = {f"model.{name}": item for name, item in self.optimizer.weights().items()}
        if self.model.norm_stats is not None:
            tensors["model.norm_stats"] = self.model.norm_stats
        return tensors | {f"optim.{name}": item for name, item in self.optimizer.tensors().items()}

    def _save(self, name: str | None = None) -> None:
        self.limits.long()
        self.check_equal(self.optimizer, self.state.global_step, always=True)
        permanent = name is not None
        name = name or f"step-{self.state.global_step:08d}-{self.state.phase}"
        meta = {
            "state": self.state.to_json(),
            "model": self.model.spec.to_json(),
            "tokenizer": self.domains.tokenizer.fingerprint,
            "layout": {axis: self.grid.size(axis) for axis in AXES},
        }
        keep = self.config.checkpoint.keep
        # Results are told of a stage whose checkpoint is complete: that one is waited for.
        if self.config.checkpoint.background and not permanent:
            self.store.save_async(name, self._tensors(), meta, permanent, keep)
        else:
            self.store.save(name, self._tensors(), meta, permanent)
            self.store.prune(keep)
        self.saved_at = self.state.global_step

    # Stages

    def _change_layout(self) -> None:
        """The last stage's model under the layout of the stage that begins, when it has another."""
        state, config = self.state, self.config
        if state.phase != BEGIN or state.stage == 0:
            return
        if config.stage_parallel(state.stage) != config.stage_parallel(self.stage_of_layout):
            name = self.store.latest()
            if name is None:
                raise RuntimeError("a finished stage left no checkpoint")
            self._load(name, state.stage)

    def _begin_stage(self) -> None:
        """Growth, when the stage has one."""
        state = self.state
        self.limits.long()
        if state.stage > 0:
            self._grow(state.stage)
        state.enter(RECOVER if self.config.stream[state.stage].recover.steps else TRAIN)

    def _grow(self, stage: int) -> None:
        config, state = self.config, self.state
        plan = make_plan(self.model.spec, config.stage_model(stage), config.growth, config.run.seed)
        optim = config.stage_optim(stage)
        self.stage_of_layout = stage
        if config.stream[stage].grow is None or (plan.unchanged and state.growth is not None):
            # Nothing to grow, or it was grown offline: the same tensors under the next stage's settings.
            self._share_out(plan.new, stage)
            same = grow(plan, self._lineage(), self.optimizer, optim, self.precision, self.grid.costs)
            self.optimizer = same.optimizer
            return
        probe = self.domains.probe(stage)
        ppl: Perplexities = lambda model: self._perplexities(model, stage, stage - 1)  # noqa: E731
        before = measure(self.optimizer, self.precision, probe, ppl)
        self._share_out(plan.new, stage)
        lineage = [*self._lineage(), plan]
        grown = grow(plan, lineage, self.optimizer, optim, self.precision, self.grid.costs)
        # From here on the smaller model is gone: the proof needs memory of its own.
        self.optimizer = grown.optimizer
        state.lineage = [*state.lineage, plan.to_json()]
        state.growth_step = state.global_step
        state.growth = prove(plan, before, grown, self.precision, probe, ppl)
        self.journal.grew(config.stream[stage].domain, state.growth)

    def _train_phase(self, stop: StopRequest) -> bool:
        """Trains to the end of the phase, or until asked to stop, which is what it returns."""
        self.limits.long()
        state, config = self.state, self.config
        stage, phase = state.stage, state.phase
        steps = self._phase_steps(stage, phase)
        batch = config.stage_batch(stage)
        builder = self.domains.builder(stage, phase)
        first, last = rows_of(self.grid, batch.global_)
        open_vocabulary(self.model, self.domains.tokenizer.vocab_size)
        self.optimizer.lr = self._peak_rate(stage, phase)
        trainer = Trainer(self.model, self.optimizer, batch.micro, config.run.seed)
        flops = training_flops_per_token(self.model.spec) * self.model.spec.positions * batch.global_
        domain = config.stream[stage].domain
        if config.checkpoint.background:
            self.store.prepare(self._tensors())
        with self._progress(stage, phase, domain, steps):
            while state.step < steps:
                began = time.perf_counter()
                factor = self._rate_factor(stage, phase) * self._rewarm()
                self._anneal()
                rows = builder.batch(state.step, first, last)
                result = trainer.step(rows, factor, lambda: self._must_stop(stop), self._after_growth())
                check_finite(result, f"stage {stage} ({domain}, {phase}), step {state.step}")
                state.step += 1
                state.global_step += 1
                tokens = batch.global_ * self.model.spec.text_length
                state.tokens += tokens
                state.stage_tokens += tokens
                state.stage_flops += flops
                seconds = time.perf_counter() - began
                state.stage_seconds += seconds
                self.limits.short()
                self._log(result, factor, tokens, flops, seconds)
                self.check_equal(self.optimizer, state.global_step)
                if state.step < steps:
                    self._between_steps(stage, phase)
                if result.stop or state.step == steps:
                    on_first_rank(self._tell_trouble, self.grid.everyone)
                if result.stop:
                    self.store.wait()  # perhaps it is why all stop
                    return True
        return False

    @property
    def _since_growth(self) -> int | None:
        """Steps done since the last growth; ``None`` without one."""
        state = self.state
        return None if state.growth_step is None else state.global_step - state.growth_step

    @property
    def _rate_strategy(self) -> str:
        """``growth.rate`` of the last growth, ``auto`` resolved."""
        return str(self.state.lineage[-1]["rate"]) if self.state.lineage else "keep"

    def _rewarm(self) -> float:
        """The factor of all rates after a growth."""
        return rewarm_factor(self._rate_strategy, self._since_growth, self.config.growth.rewarm_steps)

    def _after_growth(self) -> After:
        """What distinguishes old entries from new ones in the next step."""
        growth = self.config.growth
        return after_growth(self._rate_strategy, growth.rewarm_steps, growth.freeze_old, self._since_growth)

    def _anneal(self) -> None:
        """Before each of the first ``growth.anneal`` steps after a growth, of whatever phase: norms on their way back
        to plain statistics. The step trains what the evaluation after it will see."""
        state, steps = self.state, self.config.growth.anneal
        if steps and state.growth_step is not None and self.model.norm_stats is not None:
            anneal_norms(self.model, max(steps - (state.global_step - state.growth_step), 1))
            settle_norms(self.model)

    def _log(self, result: StepResult, factor: float, tokens: int, flops: float, seconds: float) -> None:
        """Books a step. When rank 0 cannot write, all ranks hear of it with the next step: see :meth:`_must_stop`."""
        rate = self.optimizer.lr * factor
        try:
            self.journal.step(
                self._place(), result.loss, rate, result.grad_norm, tokens, flops, seconds, self.state.step
            )
        except UserError as error:
            self.trouble = error

    def _must_stop(self, stop: StopRequest) -> bool:
        return stop() or self.trouble is not None or self.store.failed

    def _tell_trouble(self) -> None:
        if self.trouble is not None:
            raise self.trouble

    def _between_steps(self, stage: int, phase: str) -> None:
        state, config = self.state, self.config
        if phase == TRAIN and config.eval.every and state.step % config.eval.every == 0:
            self._evaluate(self.model.eval())
            self.model.train()
        if state.global_step - max(self.saved_at, 0) >= config.checkpoint.every:
            self._save()

    def _finish_phase(self) -> None:
        state, config = self.state, self.config
        self.limits.long()
        began = time.perf_counter()
        stage = state.stage
        checker = self.optimizer.checking_copy(self.precision)
        if state.phase == RECOVER:
            if state.growth is not None:
                state.growth["ppl_recovered"] = self._perplexities(checker, stage, stage - 1)
                if state.growth["moments"] == "reset":
                    self.optimizer.reset()
            state.stage_seconds += time.perf_counter() - began
            state.enter(TRAIN)
            self._save()
            return
        scores = self._evaluate(checker)
        state.stage_seconds += time.perf_counter() - began
        spec = self.model.spec
        record = {
            "domain": config.stream[stage].domain,
            "params": parameter_count(self.model.spec),
            "layers": spec.layers,
            "heads": spec.heads,
            "kv_groups": spec.kv_groups,
            "head_dim": spec.head_dim,
            "embed": spec.embed,
            "mlp": spec.mlp,
            "positions": spec.positions,
            "tokens": state.stage_tokens,
            "flops": state.stage_flops,
            "seconds": state.stage_seconds,
            **scores,
            "growth": state.growth,
            "split": state.split,
        }
        state.finish_stage(record, last=stage == len(config.stream) - 1)
        self._save(f"stage-{stage}-{record['domain']}")
        on_first_rank(lambda: self.journal.results(state.results()), self.grid.everyone)

    # Measures

    def _perplexities(self, model: LanguageModel, seen: int, stage: int) -> dict[str, float]:
        """Of the first ``seen`` domains, on text as long as that of ``stage``."""
        stream, held_out = self.config.stream, self.domains.held_out
        return {stream[index].domain: perplexity(model, held_out(index, stage)) for index in range(seen)}

    def _evaluate(self, model: LanguageModel) -> dict[str, Any]:
        """Perplexity of every seen domain, AP and AP+; also a line of ``evals.jsonl``."""
        state = self.state
        self.limits.long()
        ppl = self._perplexities(model, state.stage + 1, state.stage)
        current = self.config.stream[state.stage].domain
        scores = {
            "ppl": ppl,
            "ap": average_perplexity(ppl),
            "ap_plus": average_increased_perplexity(ppl, state.finished_ppl, current),
        }
        on_first_rank(lambda: self.journal.evaluation(self._place(), scores), self.grid.everyone)
        return scores

    def _place(self) -> Place:
        state = self.state
        domain = self.config.stream[state.stage].domain
        return Place(state.global_step, state.stage, state.phase, domain, state.tokens)

    # Schedules

    def _phase_steps(self, stage: int, phase: str) -> int:
        item = self.config.stream[stage]
        return item.recover.steps if phase == RECOVER else item.steps

    def _peak_rate(self, stage: int, phase: str) -> float:
        recover = self.config.stream[stage].recover
        return recover.lr if phase == RECOVER and recover.lr else self.config.stage_optim(stage).lr

    def _rate_factor(self, stage: int, phase: str) -> float:
        state, config = self.state, self.config
        optim: OptimConfig = config.stage_optim(stage)
        if optim.restart == "never":
            total = sum(item.recover.steps + item.steps for item in config.stream)
            return rate_factor(optim, state.global_step, total)
        recover = config.stream[stage].recover
        steps = self._phase_steps(stage, phase)
        if phase == RECOVER:
            steps = recover.schedule_steps or steps
            if recover.warmup is not None:
                optim = optim.model_copy(update={"warmup": recover.warmup})
        return rate_factor(optim, state.step, steps)

    def _progress(self, stage: int, phase: str, domain: str, steps: int) -> AbstractContextManager[Any]:
        return self.journal.phase(stage, len(self.config.stream), phase, domain, self.state.step, steps)
