"""What one layout and engine saved another goes on with: the same losses as without an interruption.

Each chain is one run of the real command, stopped by a signal every ten steps and taken up under the next layout; its
stream has a growth, whose rates go on across the links. Every second link saves in the background.
"""

from __future__ import annotations

import importlib.util
import os
import signal
from math import prod
from pathlib import Path
from typing import Any

import pytest

from elle_mp.stream.run import pretrain
from elle_mp.train.trainer import Trainer
from tests.distributed.training import forget_deepspeed
from tests.distributed_utils import run_distributed
from tests.stream.runs import lines, write_stream

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

LINK = 10
ONE: dict[str, Any] = {}
TP2 = {"tp": 2}
CP2 = {"cp": 2}
SP = {"tp": 2, "sequence_parallel": True}
DP_SHARD2 = {"dp_shard": 2}
DP_REPLICATE2 = {"dp_replicate": 2}
PP2 = {"pp": 2, "schedule": "1f1b"}
ZBV = {"pp": 2, "schedule": "zbv"}
TP2_PP2 = {"tp": 2, "pp": 2}
PP2_DP_SHARD2 = {"pp": 2, "dp_shard": 2}
ZERO1, ZERO2, ZERO3 = ({"engine": "deepspeed", "zero_stage": stage} for stage in (1, 2, 3))
ZERO_TP2 = {"engine": "deepspeed", "zero_stage": 1, "tp": 2}

CHAINS: dict[str, tuple[str, float, dict[str, Any], list[dict[str, Any]]]] = {
    "gpt": (
        "fp64",
        1e-9,
        {"rate": "mup"},
        [TP2_PP2, ONE, TP2, DP_SHARD2, CP2, SP, PP2_DP_SHARD2, TP2, PP2, ZBV, DP_SHARD2, DP_REPLICATE2],
    ),
    # DeepSpeed has no fp64.
    "llama": (
        "fp32",
        1e-4,
        {"rate": "asym_rewarm", "rewarm_steps": 20},
        [DP_SHARD2, ZERO1, ZERO2, ZERO3, TP2, ZERO_TP2, PP2],
    ),
}


def go_on(config: str, overrides: list[str], steps: int) -> None:
    """``elle-mp pretrain``, which a signal stops after so many steps."""
    if "parallel.engine=deepspeed" in overrides:
        forget_deepspeed()
    inner, left = Trainer.step, steps

    def stopping(*args: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return inner(*args)

    Trainer.step = stopping  # type: ignore[method-assign]
    try:
        pretrain(Path(config), overrides)
    finally:
        Trainer.step = inner  # type: ignore[method-assign]


@pytest.mark.parametrize("family", CHAINS)
def test_another_layout_goes_on_where_one_stopped(family: str, tmp_path: Path) -> None:
    precision, tolerance, growth, chain = CHAINS[family]
    if any("engine" in layout for layout in chain) and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    steps = LINK * len(chain)
    config = write_stream(
        tmp_path,
        family,
        model={"layers": 4},
        precision=precision,
        growth=growth,
        optim={"eps": 1e-4},
        batch={"micro": 2},
        eval={"every": 0},
        checkpoint={"every": 4},
        stream=[
            {"domain": "a", "data": "a.jsonl", "steps": steps // 2},
            {
                "domain": "b",
                "data": "b.jsonl",
                "steps": steps - steps // 2 - 5,
                "grow": {"layers": 5, "heads": 4},
                "recover": {"steps": 5},
            },
        ],
    )
    run_distributed(go_on, 1, str(config), [f"run.dir={tmp_path / 'one'}"], 0)
    wanted = [line["loss"] for line in lines(tmp_path / "one", "metrics")]
    assert len(wanted) == steps
    for link, layout in enumerate(chain):
        ranks = max(1 if layout == ONE else 2, prod(layout.get(axis, 1) for axis in ("tp", "pp", "cp", "dp_shard")))
        overrides = [f"run.dir={tmp_path / 'run'}", f"checkpoint.background={'true' if link % 2 else 'false'}"]
        overrides += [f"parallel.{key}={value}" for key, value in layout.items()]
        run_distributed(go_on, ranks, str(config), overrides, LINK)
        found = [line["loss"] for line in lines(tmp_path / "run", "metrics")]
        assert len(found) == LINK * (link + 1), layout
        assert found == pytest.approx(wanted[: len(found)], rel=tolerance), f"{chain[max(link - 1, 0)]} to {layout}"
