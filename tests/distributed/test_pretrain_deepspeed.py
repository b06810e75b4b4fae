"""A whole stream under DeepSpeed, growth and all, and one whose stages change the engine: against one process."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import yaml

from tests.distributed.test_pretrain_layouts import check_same
from tests.stream.runs import command, config_of, differences, finish, lines, reference, start, succeed

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]
ENGINE = "parallel.engine=deepspeed"


def test_zero_3_measures_what_one_process_does(tmp_path: Path) -> None:
    one, two = reference("gpt", precision="fp32"), tmp_path / "run"
    succeed(config_of(one), f"run.dir={two}", ENGINE, "parallel.zero_stage=3", ranks=2)
    losses = [[line["loss"] for line in lines(run_dir, "metrics")] for run_dir in (one, two)]
    assert len(losses[0]) == 32
    assert differences(*losses, 1e-4) == []
    check_same(one, two, 2e-3, 1e-4)


def test_a_stage_may_change_the_engine(tmp_path: Path) -> None:
    """FSDP2, then ZeRO 2, then FSDP2 with tensor parallelism: through checkpoints of one format."""
    one = reference("gpt", precision="fp32")
    tree = yaml.safe_load(config_of(one).read_text())
    tree["parallel"] = {"dp_shard": 2}
    tree["stream"][1]["parallel"] = {"engine": "deepspeed"}
    tree["stream"][2]["parallel"] = {"dp_shard": 1, "tp": 2}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    succeed(config, f"run.dir={tmp_path / 'run'}", ranks=2)
    check_same(one, tmp_path / "run", 2e-3, 1e-4)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("precision=fp64",), "precision=fp64 does not go with parallel.engine=deepspeed"),
        (("parallel.pp=2", "precision=fp32"), "parallel.pp=2 does not go with parallel.engine=deepspeed"),
    ],
)
def test_what_deepspeed_cannot_do_is_said_first(tmp_path: Path, wrong: tuple[str, ...], said: str) -> None:
    one = reference("gpt")
    ended = finish(start(command(str(config_of(one)), f"run.dir={tmp_path / 'run'}", ENGINE, *wrong, ranks=2)))
    assert ended.code != 0
    assert said in ended.err and "engine=fsdp would do" in ended.err
