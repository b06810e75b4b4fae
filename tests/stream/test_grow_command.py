"""``elle-mp grow``: the program itself on real checkpoints, what it makes, and what it says when it cannot."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from elle_mp.checkpoint.store import CheckpointStore
from elle_mp.checkpoint.stream_reader import StoredTensors
from elle_mp.models.spec import ModelSpec
from elle_mp.models.transformer import Transformer
from elle_mp.stream.evaluate_command import run_config
from elle_mp.stream.evaluation import fixed_logits
from elle_mp.stream.offline_proof import fixed_batch, prove_offline
from elle_mp.stream.state import RunState
from elle_mp.stream.stored_model import stored_model
from tests.distributed_utils import run_distributed
from tests.stream.runs import TIMINGS, Ended, call, finish, lines, reference, results, start, succeed, without
from tests.stream.test_bad_input import check_one_line, contents


def before_stage(stage: int, family: str = "gpt") -> Path:
    """The checkpoint of a finished run that stands before a stage, to be grown."""
    return reference(family) / "checkpoints" / {1: "stage-0-a", 2: "stage-1-b"}[stage]


def grow(*arguments: object, ranks: int = 1, strike: str | None = None) -> Ended:
    """``elle-mp grow``."""
    return call("grow", *map(str, arguments), ranks=ranks, strike=strike)


def grown(*arguments: object, ranks: int = 1) -> str:
    """The same, which must end well; what it printed."""
    ended = grow(*arguments, ranks=ranks)
    assert (ended.code, ended.err) == (0, ""), ended
    return ended.out


def checkpoint_of(out: Path) -> Path:
    """The one checkpoint of a grown run."""
    (name,) = CheckpointStore(out / "checkpoints").names()
    return out / "checkpoints" / name


def state_of(folder: Path) -> RunState:
    return RunState.from_json(StoredTensors(folder).meta["state"])


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    stored = StoredTensors(folder, check_hashes=True)
    return {name: stored.read(name, tuple((0, size) for size in shape)) for name, (shape, _) in stored.tensors.items()}


def same(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same tensors, bit for bit."""
    left, right = tensors_of(one), tensors_of(other)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_dry_run_shows_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    kept = contents(reference("gpt"))
    sizes = ["layers=3", "heads=4", "width=24", "mlp=100", "growth.width=weighted", "growth.noise_db=30"]
    out = grown(before_stage(1), tmp_path / "out", *sizes, "parallel.dp_shard=4", "--dry-run")
    rows = [line.split() for line in out.splitlines()]
    for row in (
        ["layers", "2", "3", "1.5"],
        ["heads", "2", "4", "2"],
        ["width", "16", "24", "1.5"],
        ["head_dim", "8", "8"],
    ):
        assert row in rows
    assert "width weighted, depth zero_out (added layers: 1), noise 30 dB" in out
    received = re.search(r"a live growth under tp=1 dp_shard=4: each rank receives (\S+) KiB", out)
    assert received is not None and float(received[1]) > 1
    assert ["exact"] in rows
    assert list(tmp_path.iterdir()) == []
    assert grown(before_stage(1), "--dry-run").count("layers") >= 1  # OUT may be left out, and so may sizes
    assert contents(reference("gpt")) == kept


def test_what_is_grown_goes_on_as_the_run_that_grew_live(tmp_path: Path) -> None:
    """Without sizes those of the next stage; then the same losses, and a record with what was measured at growth."""
    whole, out = reference("gpt"), tmp_path / "out"
    said = grown(before_stage(1), out, "--verify")
    assert "3->3" not in said and "2->3" in said and str(out) in said
    record = state_of(checkpoint_of(out)).growth
    assert record is not None and record["exact"] and record["max_logit_diff_rel"] < 1e-12
    assert record["ppl_before"].keys() == {"a"}
    assert record["ppl_after"]["a"] == pytest.approx(record["ppl_before"]["a"], rel=1e-10)
    assert perplexity_of(out, tmp_path) == pytest.approx(record["ppl_after"]["a"], rel=1e-10)
    succeed(out / "config.yaml")
    for name in ("metrics", "evals"):
        live = [line for line in without(lines(whole, name), TIMINGS) if line["step"] > 8]
        assert without(lines(out, name), TIMINGS) == live
    live, ended = (without(results(run), [*TIMINGS, "growth"]) for run in (whole, out))
    assert ended == live
    (live_growth, growth) = (results(run)["stages"][1]["growth"] for run in (whole, out))
    assert growth["max_logit_diff"] == record["max_logit_diff"]
    assert growth["ppl_recovered"] == live_growth["ppl_recovered"]
    assert growth["ppl_before"] == pytest.approx(live_growth["ppl_before"], rel=1e-10)
    measured = ("max_logit_diff", "max_logit_diff_rel", "ppl_before", "ppl_after", "seconds")
    assert without(growth, measured) == without(live_growth, measured)
    final = CheckpointStore(out / "checkpoints")
    assert same(final.folder / str(final.latest()), whole / "checkpoints" / "stage-2-c")
    states = [state_of(run / "checkpoints" / "stage-2-c") for run in (whole, out)]
    assert states[0].lineage == states[1].lineage and len(states[0].lineage) == 2
    assert states[0].growth_step == states[1].growth_step == 21


def test_two_processes_grow_the_same(tmp_path: Path) -> None:
    for ranks in (1, 2):
        out = grown(before_stage(2), tmp_path / str(ranks), "--verify", "growth.width=weighted", ranks=ranks)
        assert out.count("Growth: the plan") == 1
    one, two = (checkpoint_of(tmp_path / ranks) for ranks in "12")
    assert same(one, two)
    assert len(list(two.glob("*.distcp"))) == 2
    records = [state_of(folder).growth or {} for folder in (one, two)]
    assert records[0]["ppl_after"].keys() == {"a", "b"}
    for key in ("ppl_before", "ppl_after"):
        assert records[0][key] == pytest.approx(records[1][key], rel=1e-12)
    assert records[0]["max_logit_diff"] == records[1]["max_logit_diff"]


def proofs(run_dir: str, out: str) -> list[dict[str, Any]]:
    """The growth record of a proof with all weights in memory, and of one that reads layer by layer."""
    config, source = run_config(Path(run_dir)), StoredTensors(Path(run_dir, "checkpoints", "stage-1-b"))
    records = []
    for limit in (1 << 40, 1):
        printed = io.StringIO()
        console = Console(file=printed, width=120)
        prove_offline(config, Path(run_dir), source.meta, source, Path(out), limit, console)
        assert ("perplexities not" in printed.getvalue()) == (limit == 1)
        records.append(state_of(checkpoint_of(Path(out))).growth or {})
    return records


@pytest.mark.distributed
def test_a_proof_layer_by_layer_says_the_same(tmp_path: Path) -> None:
    """Of a growth that is not exact, under norms that weigh their statistics: a difference to be compared."""
    first, out = tmp_path / "first", tmp_path / "out"
    grown(before_stage(2), first, "width=48", "growth.width=weighted")
    grown(first, out, "mlp=300", "growth.width=aki", "--verify")
    record = state_of(checkpoint_of(out)).growth or {}
    assert not record["exact"] and record["max_logit_diff"] > 1e-4
    (records,) = run_distributed(proofs, 1, str(reference("gpt")), str(out))
    resident, streamed = records
    assert resident["max_logit_diff"] == streamed["max_logit_diff"] > 1e-4
    assert resident["ppl_after"].keys() == {"a", "b"} and streamed["ppl_after"] == {}


def test_layers_are_read_when_they_run_and_dropped_after(tmp_path: Path) -> None:
    run_distributed(layers_come_and_go, 1, str(before_stage(2)))


def layers_come_and_go(folder: str) -> None:
    source = StoredTensors(Path(folder))
    spec = ModelSpec.from_json(source.meta["model"])
    batch = fixed_batch(spec, 1)
    outputs = []
    for resident in (True, False):
        model = stored_model(spec, source, torch.float64, resident)
        held: list[int] = []

        def count(*_: Any, model: Transformer = model, held: list[int] = held) -> None:
            held.append(in_memory(model))

        for block in model.layers.values():
            block.register_forward_hook(count)
        outputs.append(fixed_logits(model, batch))
        assert in_memory(model) == (spec.layers if resident else 0)
        assert max(held) <= (spec.layers if resident else 1)
    assert torch.equal(*outputs)


def in_memory(model: Transformer) -> int:
    """Layers that hold their weights."""
    return sum(not next(block.parameters()).is_meta for block in model.layers.values())


@dataclass(frozen=True)
class Mistake:
    """What is asked for (``{out}``: a new folder, ``{run}``: the run's), and what the line must name."""

    arguments: tuple[str, ...]
    names: tuple[str, ...]


STAGE = "{run}/checkpoints/stage-0-a"
MISTAKES = {
    "no run": Mistake(("{out}/nowhere", "{out}/new"), ("nowhere: no checkpoint", "RUN/checkpoints/NAME")),
    "no checkpoint": Mistake(("{run}/checkpoints/stage-7-x", "{out}/new"), ("stage-7-x",)),
    "no OUT": Mistake((STAGE, "layers=3"), ("OUT is missing",)),
    "two OUTs": Mistake((STAGE, "{out}/new", "layers", "layers=3"), ("'layers' is neither OUT",)),
    "unknown size": Mistake((STAGE, "{out}/new", "layer=3"), ("no size 'layer'", "did you mean layers?")),
    "no such thing": Mistake((STAGE, "{out}/new", "optim.lr=1"), ("'optim.lr'", "one of layers, heads,", "growth.KEY")),
    "unknown setting": Mistake((STAGE, "{out}/new", "growth.widht=iso"), ("growth.widht", "did you mean 'width'?")),
    "no number": Mistake((STAGE, "{out}/new", "layers=two"), ("layers=two", "whole number above 0")),
    "zero": Mistake((STAGE, "{out}/new", "heads=0"), ("heads=0", "whole number above 0")),
    "shrinks": Mistake((STAGE, "{out}/new", "layers=1"), ("layers=1", "smaller than 2", "2 or more")),
    "shrinks inside": Mistake((STAGE, "{out}/new", "mlp=8"), ("mlp=8", "smaller than 64")),
    "groups": Mistake((STAGE, "{out}/new", "kv_groups=2"), ("kv_groups is for the llama family",)),
    "strategy": Mistake((STAGE, "{out}/new", "heads=3", "growth.width=iso"), ("growth.width=iso", "weighted would do")),
    "no strategy": Mistake((STAGE, "{out}/new", "growth.depth=gates"), ("growth.depth", "gates", "gate")),
    "layout": Mistake((STAGE, "{out}/new", "heads=3", "parallel.tp=2"), ("parallel.tp=2", "heads=3", "heads=2 or 4")),
    "no sizes": Mistake(("{run}", "{out}/new"), ("no sizes given", "layers=")),
    "itself": Mistake((STAGE, "{run}"), ("the run of the checkpoint itself",)),
    "inside": Mistake((STAGE, "{run}/checkpoints/new"), ("lies in the run",)),
    "not empty": Mistake((STAGE, "{out}/full"), ("full is not empty",)),
    "a file": Mistake((STAGE, "{out}/file"), ("file is a file",)),
    "below a file": Mistake((STAGE, "{out}/file/new"), ("file/new cannot be used", "Not a directory")),
    "no memory": Mistake((STAGE, "{out}/new", "--max-memory", "lots"), ("--max-memory lots", "4G")),
    "little memory": Mistake((STAGE, "{out}/new", "--max-memory", "50M"), ("the program itself takes", "or more")),
    "nothing given": Mistake((), ("CKPT",)),
}  # fmt: skip


@pytest.fixture(scope="module")
def endings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Ended, Path]]:
    """Every mistake, two at a time: how it ended, and its folder."""

    def make(item: tuple[str, Mistake]) -> tuple[str, tuple[Ended, Path]]:
        name, mistake = item
        folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
        (folder / "full").mkdir()
        (folder / "full" / "thesis.txt").write_text("mine")
        (folder / "file").write_text("mine")
        ended = grow(*(text.format(out=folder, run=reference("gpt")) for text in mistake.arguments))
        return name, (ended, folder)

    kept = contents(reference("gpt"))
    with ThreadPoolExecutor(2) as pool:
        out = dict(pool.map(make, MISTAKES.items()))
    assert contents(reference("gpt")) == kept, "the old run is as it was"
    return out


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_touched(name: str, endings: dict[str, tuple[Ended, Path]]) -> None:
    ended, folder = endings[name]
    check_one_line(ended)
    for part in MISTAKES[name].names:
        assert part in ended.err
    left = {path.relative_to(folder).as_posix(): path.is_file() and path.read_text() for path in folder.rglob("*")}
    assert left == {"full": False, "full/thesis.txt": "mine", "file": "mine"}


def copied(tmp_path: Path) -> Path:
    """A run with one checkpoint, to be spoilt."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copytree(before_stage(1), run / "checkpoints" / "stage-0-a")
    shutil.copytree(reference("gpt") / "tokenizer", run / "tokenizer")
    shutil.copy(reference("gpt") / "config.yaml", run)
    return run


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def data_of(run: Path) -> Path:
    return next((run / "checkpoints" / "stage-0-a").glob("*.distcp"))


DAMAGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "cut short": (lambda run: os.truncate(data_of(run), 9000), ("distcp", "9000 bytes, not")),
    "gone": (lambda run: data_of(run).unlink(), ("distcp", "is missing")),
    "flipped": (lambda run: flip(data_of(run)), ("distcp", "SHA-256")),
    "flipped metadata": (lambda run: flip(run / "checkpoints" / "stage-0-a" / ".metadata"), (".metadata", "damaged")),
    "no meta": (lambda run: (run / "checkpoints" / "stage-0-a" / "meta.json").unlink(), ("meta.json", "missing")),
    "no configuration": (lambda run: (run / "config.yaml").unlink(), ("config.yaml", "missing")),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_source_is_named(name: str, tmp_path: Path) -> None:
    """Hashes cost a second reading of the checkpoint: they are compared when a proof is asked for."""
    run, out = copied(tmp_path), tmp_path / "out"
    damage, names = DAMAGES[name]
    damage(run)
    kept = contents(run)
    ended = grow(run / "checkpoints" / "stage-0-a", out, "layers=3", *(["--verify"] if name == "flipped" else []))
    check_one_line(ended)
    for part in names:
        assert part in ended.err
    assert not out.exists() and contents(run) == kept


def check_unusable(out: Path) -> None:
    """No command takes a half-made directory for a run."""
    ended = call("evaluate", str(out), "--data", f"a={reference('gpt').parent / 'a.jsonl'}")
    check_one_line(ended)
    assert (
        "no complete checkpoint yet" in ended.err
        or "no checkpoint" in ended.err
        or "config.yaml is missing" in ended.err
    )
    ended = call("pretrain", str(out / "config.yaml"))
    check_one_line(ended)
    assert "no such file" in ended.err
    ended = call("pretrain", str(reference("gpt") / "config.yaml"), f"run.dir={out}")
    check_one_line(ended)
    assert "holds no run" in ended.err


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A growth that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    grown(before_stage(1), out)
    return out


@pytest.mark.parametrize("strike", ["block=40", "close=1"])
def test_killed_it_is_no_run_and_the_same_command_makes_it_one(strike: str, whole: Path, tmp_path: Path) -> None:
    out, kept = tmp_path / "out", contents(reference("gpt"))
    ended = grow(before_stage(1), out, strike=f"all:SIGKILL@{strike}")
    assert ended.code == -signal.SIGKILL
    check_unusable(out)
    grown(before_stage(1), out)
    assert same(checkpoint_of(out), checkpoint_of(whole))
    for run in (out, whole):
        assert {path.name for path in run.iterdir()} == {"checkpoints", "config.yaml", "tokenizer"}
        assert {path.name for path in (run / "checkpoints").iterdir()} == {"latest", "stage-0-a-grown"}
    assert contents(reference("gpt")) == kept


def test_a_run_that_is_there_is_not_grown_over(whole: Path) -> None:
    kept = contents(whole)
    ended = grow(before_stage(1), whole)
    check_one_line(ended)
    assert "is not empty" in ended.err and contents(whole) == kept


def test_what_a_kill_left_is_no_part_of_another_growth(tmp_path: Path) -> None:
    out = tmp_path / "out"
    grow(before_stage(1), out, strike="all:SIGKILL@close=1")
    grown(before_stage(2), out)
    assert checkpoint_of(out).name == "stage-1-b-grown"


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    out, kept = tmp_path / "out", contents(reference("gpt"))
    arguments = [sys.executable, "-m", "elle_mp", "grow", str(before_stage(1)), str(out)]
    limit = 600_000  # bytes of a file: the tokenizer fits, the checkpoint does not
    process = start(arguments, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    ended = finish(process)
    check_one_line(ended)
    assert "cannot write checkpoint" in ended.err and "File too large" in ended.err and str(out) in ended.err
    assert list(out.iterdir()) == []
    assert contents(reference("gpt")) == kept


def test_sizes_that_the_stream_does_not_name(tmp_path: Path) -> None:
    """The stages after it start from what was asked for: what they would shrink stays."""
    out, again = tmp_path / "out", tmp_path / "again"
    grown(before_stage(1), out, "layers=5", "heads=4", "mlp=80", "growth.width=weighted", "growth.moments=asym_reset")
    config = run_config(out)
    assert (config.growth.width, config.growth.moments) == ("weighted", "asym_reset")
    sizes = config.stage_model(1)
    assert (sizes.layers, sizes.heads, sizes.embed, sizes.mlp_size) == (5, 4, 32, 80)
    last = config.stage_model(2)
    assert (last.layers, last.heads, last.embed, last.mlp_size) == (5, 6, 48, 200)
    said = succeed(out / "config.yaml").out
    assert "going on from checkpoint stage-0-a-grown" in said and "grew for c: layers 5 -> 5, heads 4 -> 6" in said
    stages = results(out)["stages"]
    assert [stage["layers"] for stage in stages] == [2, 5, 5]
    assert stages[1]["growth"]["to"]["mlp"] == 80 and stages[1]["growth"]["ppl_recovered"].keys() == {"a"}
    # The end of the stream can be grown, too, and be evaluated.
    grown(out, again, "layers=6", "heads=7", "vocab=400")
    succeed(again / "config.yaml")
    assert StoredTensors(checkpoint_of(again)).tensors["model.token_table"][0] == (448, 56)
    assert perplexity_of(again, tmp_path) == pytest.approx(perplexity_of(out, tmp_path), rel=1e-9)


def perplexity_of(run: Path, tmp_path: Path) -> float:
    """Of the first domain."""
    written = tmp_path / "evaluated.json"
    ended = call("evaluate", str(run), "--data", f"a={reference('gpt').parent / 'a.jsonl'}", "--json", str(written))
    assert ended.code == 0, ended.err
    return float(json.loads(written.read_text())["ppl"]["a"])
