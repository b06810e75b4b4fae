"""The arms of growth_study.py: sizes, strategies, and what all of them share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

FROM_SCRATCH, NOT_GROWN, EQUAL_TOKENS = "from scratch", "not grown", "not grown, equal tokens"
LONG = "-long"
"""Groups whose name ends so have four times the steps after growth."""


@dataclass(frozen=True)
class Settings:
    """What all arms share; a result of other settings is run again."""

    seq_len: int = 64
    vocab: int = 1024
    batch: int = 16
    lr: float = 5e-3
    bert_lr: float = 1e-3
    source_steps: int = 600
    bert_source_steps: int = 600
    steps: int = 200
    every: int = 40
    rewarm_steps: int = 40
    valid_rows: int = 64
    """Held-out sequences of each domain; twice as many for ``bert``, which predicts fewer of their tokens."""

    def rate(self, family: str) -> float:
        """A family's peak learning rate."""
        return self.bert_lr if family == "bert" else self.lr

    def source(self, family: str) -> int:
        """Steps of a family's source model."""
        return self.bert_source_steps if family == "bert" else self.source_steps


@dataclass(frozen=True)
class Arm:
    """One way to spend the FLOPs of a group."""

    family: str
    group: str
    name: str
    growth: Mapping[str, Any]

    @property
    def recovers(self) -> bool:
        """Whether its first steps are the paper's recovery."""
        return self.name.endswith(", recovery")

    @property
    def longer(self) -> int:
        """How many times the usual steps follow its growth."""
        return 4 if self.group.endswith(LONG) else 1

    @property
    def key(self) -> str:
        """Its path below ``--runs``, without the seed."""
        return f"{self.family}/{self.group}/{self.name}"


SOURCES: dict[str, dict[str, Any]] = {
    "gpt": {"layers": 3, "heads": 4, "head_dim": 16},
    "llama": {"layers": 3, "heads": 4, "kv_groups": 2, "head_dim": 16, "mlp_ratio": 2.625},
    "bert": {"layers": 3, "heads": 4, "head_dim": 16},
}
TARGETS: dict[tuple[str, str], dict[str, Any]] = {
    ("gpt", "width1.5"): {"heads": 6},
    ("gpt", "width1.5-long"): {"heads": 6},
    ("gpt", "depth2"): {"layers": 6},
    ("gpt", "depth2-long"): {"layers": 6},
    ("gpt", "width2"): {"heads": 8},
    ("gpt", "width2-long"): {"heads": 8},
    ("gpt", "inner2"): {"heads": 8, "mlp": 512, "width": 64},
    ("llama", "width1.5"): {"heads": 6, "kv_groups": 3},
    ("llama", "width2"): {"heads": 8, "kv_groups": 4},
    ("bert", "depth2"): {"layers": 6},
    ("bert", "width1.5"): {"heads": 6},
}
"""The sizes of each group's target; ``inner2`` grows heads and MLP alone."""


ARMS = """
1 gpt/width1.5    weighted:                 {width: weighted}
1 gpt/width1.5    weighted, anneal 50:      {width: weighted, anneal: 50}
1 gpt/width1.5    lemon:                    {width: lemon}
1 gpt/width1.5    elle, recovery:           {width: elle}
1 gpt/width1.5    aki:                      {width: aki}
1 gpt/width1.5    sparkling:                {width: sparkling}
1 gpt/width1.5    from scratch:             {}
1 gpt/width1.5    not grown:                {}
1 gpt/depth2      zero_out:                 {depth: zero_out}
1 gpt/depth2      zero_out, freeze_old 50:  {depth: zero_out, freeze_old: 50}
1 gpt/depth2      stack:                    {depth: stack}
1 gpt/depth2      interleave:               {depth: interleave}
1 gpt/depth2      solar:                    {depth: solar}
1 gpt/depth2      elle, recovery:           {depth: elle}
1 gpt/depth2      from scratch:             {}
1 gpt/depth2      not grown:                {}
1 gpt/width2      replicate:                {width: replicate}
1 gpt/width2      replicate, no noise:      {width: replicate, noise_db: null}
1 gpt/width2      replicate, reset:         {width: replicate, moments: reset}
1 gpt/width2      replicate, mup:           {width: replicate, rate: mup}
1 gpt/width2      replicate, asym_reset:    {width: replicate, moments: asym_reset}
1 gpt/width2      from scratch:             {}
1 gpt/width2      not grown:                {}
2 gpt/width2      blockdiag:                {width: blockdiag}
2 gpt/width2      sparkling:                {width: sparkling}
2 gpt/width2      elle, recovery:           {width: elle}
2 gpt/width2      aki:                      {width: aki}
2 gpt/inner2      replicate:                {width: replicate}
2 gpt/inner2      zero_pad:                 {width: zero_pad}
2 llama/width1.5  iso:                      {width: iso}
2 llama/width1.5  zero_pad:                 {width: zero_pad}
2 llama/width1.5  elle, recovery:           {width: elle}
2 llama/width2    replicate:                {width: replicate}
2 llama/width2    iso:                      {width: iso}
2 llama/width2    zero_pad:                 {width: zero_pad}
2 bert/depth2     gate:                     {depth: gate}
2 bert/depth2     affine_migrate:           {depth: affine_migrate}
2 bert/depth2     stack:                    {depth: stack}
2 bert/depth2     interleave:               {depth: interleave}
2 bert/width1.5   weighted:                 {width: weighted}
2 bert/width1.5   elle, recovery:           {width: elle}
3 gpt/width1.5    weighted, 0 dB:           {width: weighted, noise_db: 0}
3 gpt/width2      replicate, 0 dB:          {width: replicate, noise_db: 0}
3 gpt/width2      replicate, 10 dB:         {width: replicate, noise_db: 10}
3 gpt/width1.5    weighted, asym_reset:     {width: weighted, moments: asym_reset}
3 gpt/width1.5    weighted, mup:            {width: weighted, rate: mup}
3 gpt/width1.5    not grown, equal tokens:  {}
3 gpt/width1.5    weighted, reset:          {width: weighted, moments: reset}
3 gpt/width2      replicate, rewarm:        {width: replicate, rate: rewarm}
3 gpt/depth2      stack, scaled:            {depth: stack, moments: scaled}
3 gpt/width1.5    elle:                     {width: elle}
4 llama/width1.5  not grown, equal tokens:  {}
4 bert/depth2     not grown, equal tokens:  {}
4 gpt/inner2      from scratch:             {}
4 llama/width1.5  from scratch:             {}
4 llama/width1.5  not grown:                {}
4 llama/width2    from scratch:             {}
4 bert/depth2     from scratch:             {}
4 bert/depth2     not grown:                {}
4 bert/width1.5   from scratch:             {}
5 gpt/width1.5-long  weighted:              {width: weighted}
5 gpt/width1.5-long  lemon:                 {width: lemon}
5 gpt/width1.5-long  weighted, 0 dB:        {width: weighted, noise_db: 0}
5 gpt/width1.5-long  weighted, anneal 50:   {width: weighted, anneal: 50}
5 gpt/width1.5-long  not grown:             {}
5 gpt/depth2-long    zero_out:              {depth: zero_out}
5 gpt/depth2-long    stack:                 {depth: stack}
5 gpt/width2-long    replicate:             {width: replicate}
5 gpt/width2-long    blockdiag:             {width: blockdiag}
5 gpt/width2-long    replicate, 0 dB:       {width: replicate, noise_db: 0}
"""
"""Tier, group, name and growth of every arm, the most telling first; within a tier one seed after the other."""


def arms_by_tier() -> list[list[Arm]]:
    """:data:`ARMS`, parsed."""
    tiers: dict[str, list[Arm]] = {}
    for line in ARMS.strip().splitlines():
        head, growth = line.split(":", 1)
        tier, group, name = head.split(None, 2)
        family, kind = group.split("/")
        tiers.setdefault(tier, []).append(Arm(family, kind, name, yaml.safe_load(growth)))
    return list(tiers.values())
