"""``elle-mp pretrain --dry-run``: the stream on paper, as a user asks for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "llama-7b.yaml"


def dry_run(*arguments: str) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-m", "elle_mp", "pretrain", str(CONFIG), "--dry-run", *arguments]
    return subprocess.run(call, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    done = dry_run("parallel.split=measured", "--json", str(path))
    assert done.returncode == 0, done.stderr
    assert "nothing is measured on paper" in done.stdout
    for word in ("web", "code", "science", "activations", "dp gather", "1024"):
        assert word in done.stdout
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_a_thousand_ranks_are_planned_on_one(numbers: dict[str, Any]) -> None:
    web, code, science = numbers["stages"]
    assert numbers["world_size"] == 1024
    assert [stage["ranks_used"] for stage in (web, code, science)] == [1024] * 3
    assert web["parameters"] < code["parameters"] < science["parameters"]
    assert 6.9e9 < science["parameters"] < 7.5e9
    # Without sharding and tensor parallelism: fp32 masters and two moments, of eight shards.
    memory = web["pipeline_ranks"][0]["memory"]
    assert memory["masters"] == pytest.approx(4 * web["parameters"] / 8, rel=0.01)
    assert memory["optimizer"] == pytest.approx(2 * memory["masters"], rel=0.01)
    # The pipeline ranks of the last stage share the layers, and interleave them.
    assert [rank["layers"] for rank in science["pipeline_ranks"]] == [[8, 8], [8, 8]]
    assert len(web["pipeline_ranks"]) == 1


def test_every_division_is_checked_and_every_fault_told() -> None:
    done = dry_run("parallel.world_size=1000", "stream.1.parallel.tp=3", "batch.global=1000")
    assert done.returncode == 2 and not done.stdout
    lines = done.stderr.splitlines()
    assert all(line.startswith("elle-mp: error: ") for line in lines) and len(lines) >= 3
    assert any("tp=3 does not divide kv_groups=8" in line for line in lines)
    assert any("do not divide the 1000" in line for line in lines)
    assert len(set(lines)) == len(lines)


def test_its_numbers_are_asked_for_with_it() -> None:
    call = [sys.executable, "-m", "elle_mp", "pretrain", str(CONFIG), "--json", "plan.json"]
    done = subprocess.run(call, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "--dry-run" in done.stderr
