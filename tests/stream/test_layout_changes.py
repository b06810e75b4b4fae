"""A stream whose stages change the layout holds the process groups of one layout, not of all that it has had."""

from __future__ import annotations

import gc
import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

from elle_mp.stream.run import pretrain
from elle_mp.stream.runner import StreamRunner
from tests.distributed_utils import run_distributed
from tests.stream.runs import write_stream

pytestmark = pytest.mark.distributed
FSDP, TENSOR, ZERO = {"dp_shard": 2}, {"tp": 2}, {"engine": "deepspeed"}


def threads_at_stages(config: str) -> list[int]:
    """This process's threads before every stage: gloo has three for each group."""
    inner, seen = StreamRunner._run_stage, []

    def counting(self: StreamRunner, *arguments: Any) -> bool:
        gc.collect()
        seen.append(len(os.listdir("/proc/self/task")))
        return inner(self, *arguments)

    StreamRunner._run_stage = counting  # type: ignore[method-assign]
    pretrain(Path(config))
    return seen


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_what_a_layout_held_ends_with_it(tmp_path: Path) -> None:
    zero = ZERO if importlib.util.find_spec("deepspeed") else FSDP
    stages = [
        {"domain": f"d{number}", "data": f"{'abc'[number % 3]}.jsonl", "steps": 2, "parallel": layout}
        for number, layout in enumerate((FSDP, TENSOR, zero, TENSOR, zero))
    ]
    config = write_stream(
        tmp_path,
        precision="fp32",
        eval={"every": 0},
        checkpoint={"every": 1, "background": True},
        stream=stages,
    )
    for seen in run_distributed(threads_at_stages, 2, str(config)):
        assert len(seen) == 5
        assert len(set(seen)) == 1, seen
