"""What a run writes: the fields, and their meaning against independent counts."""

from __future__ import annotations

from math import exp, isclose, log, prod
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from elle_mp.models.flops import parameter_count, training_flops_per_token
from elle_mp.parallel.sharding import named_specs
from tests.stream.runs import lines, record, reference, results, run, succeed, write_stream
from tests.tiny import grid, model_of, spec_of

PLACE = ["step", "stage", "phase", "domain", "tokens"]
METRICS = [*PLACE, "loss", "lr", "grad_norm", "tokens_per_second", "mfu"]
STAGE = "domain params layers heads tokens flops seconds ppl ap ap_plus growth".split()  # noqa: SIM905
GROWTH = "exact max_logit_diff ppl_before ppl_after ppl_recovered seconds bytes_communicated".split()  # noqa: SIM905
TEXT, BATCH = 31, 8
PHASES = (("a", "train", 8), ("b", "recover", 5), ("b", "train", 8), ("c", "recover", 4), ("c", "train", 7))
FAMILIES = ("gpt", "bert", "llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_metrics_have_a_line_a_step(family: str) -> None:
    written = lines(reference(family), "metrics")
    assert all(list(line) == METRICS for line in written)
    assert [line["step"] for line in written] == list(range(1, 33))
    assert [line["tokens"] for line in written] == [step * BATCH * TEXT for step in range(1, 33)]
    places = [(domain, phase) for domain, phase, steps in PHASES for _ in range(steps)]
    assert [(line["domain"], line["phase"]) for line in written] == places
    assert [line["stage"] for line in written] == ["abc".index(domain) for domain, _ in places]
    for line in written:
        assert 0 < line["loss"] < 20
        assert line["grad_norm"] > 0
        assert 0 <= line["lr"] <= 3e-3
        assert line["tokens_per_second"] > 0
        assert 0 < line["mfu"] < 1
    # Adjacent steps of a phase lie on the schedule, which starts anew with each phase.
    rates = [line["lr"] for line in written[:8]]
    assert rates[1] == 3e-3
    assert rates == [*sorted(rates[:2]), *sorted(rates[2:], reverse=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluations_score_every_seen_domain(family: str) -> None:
    written = lines(reference(family), "evals")
    assert all(list(line) == [*PLACE, "ppl", "ap", "ap_plus"] for line in written)
    assert [line["step"] for line in written] == [3, 6, 8, 16, 19, 21, 28, 31, 32]
    finished: dict[str, float] = {}
    for line in written:
        ppl = line["ppl"]
        assert list(ppl) == list("abc"[: line["stage"] + 1])
        assert isclose(line["ap"], exp(sum(log(value) for value in ppl.values()) / len(ppl)), rel_tol=1e-12)
        worse = [ppl[domain] - finished[domain] for domain in finished]
        expected = sum(worse) / len(worse) if worse else None
        assert line["ap_plus"] == (pytest.approx(expected, rel=1e-12) if worse else None)
        if line["step"] in (8, 21, 32):
            finished[line["domain"]] = ppl[line["domain"]]
    assert all(line["phase"] == "train" for line in written)


@pytest.mark.parametrize("family", FAMILIES)
def test_results_hold_the_stages_and_the_growths(family: str) -> None:
    run_dir = reference(family)
    whole, evals = results(run_dir), {line["step"]: line for line in lines(run_dir, "evals")}
    assert list(whole) == ["ap", "ap_plus", "stages"]
    assert [stage["domain"] for stage in whole["stages"]] == ["a", "b", "c"]
    assert [(stage["layers"], stage["heads"]) for stage in whole["stages"]] == [(2, 2), (3, 4), (4, 6)]
    assert [stage["tokens"] for stage in whole["stages"]] == [steps * BATCH * TEXT for steps in (8, 13, 11)]
    assert (whole["ap"], whole["ap_plus"]) == (whole["stages"][2]["ap"], whole["stages"][2]["ap_plus"])
    for stage, end in zip(whole["stages"], (8, 21, 32), strict=True):
        assert set(STAGE) <= set(stage)
        assert {key: stage[key] for key in ("ppl", "ap", "ap_plus")} == {
            key: evals[end][key] for key in ("ppl", "ap", "ap_plus")
        }
        assert stage["seconds"] > 0
    assert whole["stages"][0]["growth"] is None
    for index in (1, 2):
        growth = whole["stages"][index]["growth"]
        assert set(GROWTH) <= set(growth)
        assert growth["exact"]
        assert growth["max_logit_diff"] < 1e-10
        assert growth["bytes_communicated"] == 0
        assert list(growth["ppl_before"]) == list("abc"[:index])
        assert growth["ppl_before"] == whole["stages"][index - 1]["ppl"]
        assert growth["ppl_after"] == pytest.approx(growth["ppl_before"], rel=1e-10)
        assert growth["ppl_recovered"].keys() == growth["ppl_before"].keys()
        assert growth["ppl_recovered"] != growth["ppl_after"]


def test_flops_of_a_stage_are_those_of_its_steps() -> None:
    """By hand: gpt, 2 layers, width 16, MLP 64, 32 positions, a table of 320 rows."""
    weights = 2 * (16 * 48 + 16 * 16 + 2 * 16 * 64) + 320 * 16 * 31 / 32
    attention = 2 * 2 * 32 * 16 / 2
    flops = results(reference("gpt"))["stages"][0]["flops"]
    assert flops == pytest.approx(6 * (weights + attention) * 32 * BATCH * 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_those_that_torch_counts(family: str) -> None:
    """Sizes at which attention is a small part: torch counts the whole square of a causal one, the formula half."""
    sizes = {"head_dim": 32, "mlp": 512, "seq_len": 34, "layers": 2}
    model = model_of(spec_of(family, **sizes), grid(), torch.float32)
    tokens = torch.randint(5, 300, (4, 32))
    targets = torch.randint(5, 300, (4, 32))
    if family == "bert":
        targets[:, 5:] = -100  # 5 of 32: 15 %
    with FlopCounterMode(display=False) as counter:
        model(tokens, torch.zeros(4, dtype=torch.int64), targets).backward()
    expected = training_flops_per_token(model.spec) * model.spec.positions * 4
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.08)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_there_are(family: str) -> None:
    model = model_of(spec_of(family), grid())
    assert parameter_count(model.spec) == sum(parameter.numel() for parameter in model.parameters())
    assert parameter_count(model.spec) == sum(prod(spec.shape(model.sizes)) for _, spec in named_specs(model))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of its own, with TensorBoard, written every fifth step."""
    folder = tmp_path_factory.mktemp("finished")
    succeed(write_stream(folder, log={"every": 5, "tensorboard": True}))
    return folder


def test_a_finished_run_prints_its_table_again_and_changes_nothing(finished: Path) -> None:
    run_dir = finished / "run"
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in run_dir.rglob("*") if path.is_file()}
    (finished / "a.jsonl").rename(finished / "moved.jsonl")  # its text is no longer needed
    ended = succeed(finished / "config.yaml")
    (finished / "moved.jsonl").rename(finished / "a.jsonl")
    after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in run_dir.rglob("*") if path.is_file()}
    assert before == after
    for text in ("Perplexity", "Growth", "AP+"):
        assert text in ended.out
    assert str(run_dir / "results.json") in ended.out.replace("\n", "")
    assert "going on" not in ended.out
    assert run(finished / "config.yaml", "optim.lr=1").code == 2


def test_lines_come_every_so_many_steps(finished: Path) -> None:
    every_step = lines(reference("gpt"), "metrics")
    written = lines(finished / "run", "metrics")
    assert [line["step"] for line in written] == [5, 10, 15, 20, 25, 30]
    for line in written:
        assert line["loss"] == every_step[line["step"] - 1]["loss"]
    assert record(finished / "run")["results"] == record(reference("gpt"))["results"]
    assert list((finished / "run" / "tensorboard").glob("events*"))
