"""Where a run stands: what a checkpoint keeps beside its tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

BEGIN, DONE = "begin", "done"


@dataclass
class RunState:
    """The position in the stream and what has been measured so far.

    A batch is a pure function of (seed, stage, phase, step), so this position is the whole state of the data and of
    every random generator.

    Attributes:
        stage: index into the stream.
        phase: ``begin`` (growth is still to come), ``recover``, ``train``, or ``done`` (of the whole stream).
        step: finished steps of the phase.
        global_step: finished steps of the run.
        tokens: text tokens trained on so far, of the run.
        stage_tokens: of this stage.
        stage_flops: training FLOPs of this stage.
        stage_seconds: wall time of this stage.
        growth: the record of this stage's growth.
        split: the record of this stage's measured split.
        lineage: every growth that the model has been through, as plans in plain values.
        growth_step: ``global_step`` at the last growth of the run; ``None`` when there was none.
        stages: records of finished stages, as in ``results.json``.
    """

    stage: int = 0
    phase: str = BEGIN
    step: int = 0
    global_step: int = 0
    tokens: int = 0
    stage_tokens: int = 0
    stage_flops: float = 0.0
    stage_seconds: float = 0.0
    growth: dict[str, Any] | None = None
    stages: list[dict[str, Any]] = field(default_factory=list)
    growth_step: int | None = None
    lineage: list[dict[str, Any]] = field(default_factory=list)
    split: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values for a checkpoint's metadata."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> RunState:
        """The inverse of :meth:`to_json`."""
        return cls(**fields)

    def enter(self, phase: str) -> None:
        """Starts a phase of this stage."""
        self.phase, self.step = phase, 0

    def finish_stage(self, record: dict[str, Any], last: bool) -> None:
        """Books a finished stage and moves on to the next, or to the end."""
        self.stages.append(record)
        self.stage += 1
        self.phase, self.step = (DONE if last else BEGIN), 0
        self.stage_tokens, self.stage_flops, self.stage_seconds = 0, 0.0, 0.0
        self.growth = self.split = None

    def results(self) -> dict[str, Any]:
        """What ``results.json`` holds."""
        last = self.stages[-1] if self.stages else {}
        return {"ap": last.get("ap"), "ap_plus": last.get("ap_plus"), "stages": self.stages}

    @property
    def finished_ppl(self) -> dict[str, float]:
        """Perplexity of each finished domain at the end of its own stage."""
        return {record["domain"]: record["ppl"][record["domain"]] for record in self.stages}
