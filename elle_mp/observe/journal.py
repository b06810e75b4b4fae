"""Everything a run writes while it goes: metrics, evaluations, results, TensorBoard, and the progress line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elle_mp.observe.metrics import JsonLines, TensorBoardWriter, write_json
from elle_mp.observe.progress import NullProgress, Progress


@dataclass(frozen=True)
class Place:
    """Where in the stream something was measured."""

    step: int
    """Finished steps of the run."""
    stage: int
    phase: str
    domain: str
    tokens: int
    """Text tokens trained on so far."""

    def fields(self) -> dict[str, Any]:
        """The leading fields of every line."""
        return {
            "step": self.step,
            "stage": self.stage,
            "phase": self.phase,
            "domain": self.domain,
            "tokens": self.tokens,
        }


class Journal:
    """Writes on rank 0; on the other ranks it does nothing.

    Args:
        run_dir: the run directory.
        first: whether this is rank 0.
        every: steps between lines of ``metrics.jsonl``.
        tensorboard: whether to write event files.
        peak: FLOP/s of all ranks together, for ``mfu``.
    """

    def __init__(self, run_dir: Path, first: bool, every: int, tensorboard: bool, peak: float) -> None:
        self.run_dir = run_dir
        self.first = first
        self.every = every
        self.peak = peak
        self.progress: Progress | NullProgress = Progress() if first else NullProgress()
        self._want_tensorboard = tensorboard and first
        self._tensorboard: TensorBoardWriter | None = None
        self._metrics = JsonLines(run_dir / "metrics.jsonl")
        self._evals = JsonLines(run_dir / "evals.jsonl")
        self._window = [0.0, 0.0, 0.0]

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        self.progress.say(text)

    def start(self, step: int) -> None:
        """Drops what a killed run wrote beyond ``step``, the last saved one."""
        if not self.first:
            return
        for lines in (self._metrics, self._evals):
            lines.truncate_after(lambda record: int(record["step"]) <= step)
        if self._want_tensorboard:
            self._tensorboard = TensorBoardWriter(self.run_dir / "tensorboard", purge_step=step + 1)

    @contextmanager
    def phase(self, stage: int, stages: int, phase: str, domain: str, done: int, total: int) -> Iterator[None]:
        """Shows the progress of one phase."""
        self._window = [0.0, 0.0, 0.0]
        with self.progress.phase(stage, stages, phase, domain, done, total):
            yield

    def step(
        self,
        place: Place,
        loss: float,
        lr: float,
        grad_norm: float,
        tokens: int,
        flops: float,
        seconds: float,
        phase_step: int,
    ) -> None:
        """Books one step; every ``every`` steps it becomes a line."""
        if not self.first:
            return
        for index, value in enumerate((tokens, flops, seconds)):
            self._window[index] += value
        speed = self._window[0] / max(self._window[2], 1e-9)
        self.progress.update(phase_step, loss, speed)
        if place.step % self.every:
            return
        record = place.fields() | {
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens_per_second": speed,
            "mfu": self._window[1] / max(self._window[2], 1e-9) / self.peak,
        }
        self._metrics.append(record)
        if self._tensorboard is not None:
            scalars = {f"train/{key}": record[key] for key in ("loss", "lr", "grad_norm", "tokens_per_second", "mfu")}
            self._tensorboard.scalars(scalars, place.step)
        self._window = [0.0, 0.0, 0.0]

    def evaluation(self, place: Place, scores: dict[str, Any]) -> None:
        """Writes the perplexities of the seen domains, AP and AP+."""
        if not self.first:
            return
        self._evals.append(place.fields() | scores)
        ppl = ", ".join(f"{domain} {value:.2f}" for domain, value in scores["ppl"].items())
        self.say(f"step {place.step}: perplexity {ppl}; AP {scores['ap']:.2f}")
        if self._tensorboard is not None:
            scalars = {f"ppl/{domain}": value for domain, value in scores["ppl"].items()} | {"eval/ap": scores["ap"]}
            if scores["ap_plus"] is not None:
                scalars["eval/ap_plus"] = scores["ap_plus"]
            self._tensorboard.scalars(scalars, place.step)

    def grew(self, domain: str, record: dict[str, Any]) -> None:
        """Says what a growth did."""
        old, new = record["from"], record["to"]
        kind = "exact" if record["exact"] else "not exact"
        self.say(
            f"grew for {domain}: layers {old['layers']} -> {new['layers']}, heads {old['heads']} -> {new['heads']}, "
            f"width {old['embed']} -> {new['embed']}, "
            f"{old['params'] / 1e6:.2f} M -> {new['params'] / 1e6:.2f} M parameters; "
            f"{record['width']}/{record['depth']}, {kind}: "
            f"largest logit difference {record['max_logit_diff_rel']:.1e} relative"
        )

    def results(self, results: dict[str, Any]) -> None:
        """Writes ``results.json`` whole."""
        if self.first:
            write_json(self.run_dir / "results.json", results)

    def close(self) -> None:
        """Flushes the event file."""
        if self._tensorboard is not None:
            self._tensorboard.close()
