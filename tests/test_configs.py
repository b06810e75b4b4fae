"""The configurations that come with the program: each loads, fits its layout, and grows as it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

from elle_mp.config import Config
from elle_mp.config_file import load_config
from elle_mp.config_layout import check_layout
from elle_mp.errors import UserError
from elle_mp.growth.plan import GrowthPlan, make_plan
from elle_mp.growth.stages import stage_specs
from elle_mp.models.spec import ModelSpec
from elle_mp.models.transformer import Transformer
from elle_mp.stream.domains import vocabulary_size
from elle_mp.train.schedules import rate_factor
from tests.tiny import grid

FOLDER = Path(__file__).resolve().parent.parent / "configs"
ALL = sorted(path.name for path in FOLDER.glob("*.yaml"))
PAPER = {
    # layers, heads and millions of parameters of each stage: the table of growth in the paper's scripts.
    "elle-bert-base.yaml": ((6, 6, 30.35), (8, 8, 51.54), (10, 10, 82.20), (11, 11, 101.82), (12, 12, 124.70)),
    "elle-bert-large.yaml": ((12, 12, 124.70), (15, 15, 215.80), (18, 16, 279.84), (21, 16, 317.63), (24, 16, 355.42)),
    "elle-gpt-base.yaml": ((6, 6, 29.95), (8, 8, 50.96), (10, 10, 81.41), (11, 11, 100.91), (12, 12, 123.66)),
}
QUICK = [name for name in ALL if name.startswith("quickstart")]


def plans(config: Config) -> list[GrowthPlan]:
    """The growth between each two stages."""
    spec, made = ModelSpec.from_config(config, config.tokenizer.vocab_size), []
    for index in range(1, len(config.stream)):
        made.append(make_plan(spec, config.stage_model(index), config.growth, config.run.seed))
        spec = made[-1].new
    return made


def parameters(spec: ModelSpec) -> int:
    """Parameters of a model, without giving it memory."""
    with torch.device("meta"):
        return sum(item.numel() for item in Transformer(spec, grid(), torch.float32).parameters())


def test_there_is_a_configuration_for_every_family() -> None:
    families = {load_config(FOLDER / name).model.family for name in QUICK}
    assert families == {"bert", "gpt", "llama"}
    assert set(PAPER) <= set(ALL) and "five-domains.yaml" in ALL


@pytest.mark.parametrize("name", ALL)
def test_it_loads_fits_its_ranks_and_grows(name: str) -> None:
    config = load_config(FOLDER / name)
    check_layout(config, config.parallel.world_size or 1)
    stage_specs(config, vocabulary_size(config))
    assert all(plan.exact for plan in plans(config))


@pytest.mark.parametrize("name", ALL)
def test_its_first_line_is_its_purpose_and_its_run_directory_its_name(name: str) -> None:
    first = (FOLDER / name).read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ") and len(first.split()) >= 8
    assert yaml.safe_load((FOLDER / name).read_text())["run"]["dir"] == f"runs/{Path(name).stem}"


@pytest.mark.parametrize("name", QUICK)
def test_a_quick_start_is_built_in_and_grows_twice_by_no_whole_multiple(name: str) -> None:
    config = load_config(FOLDER / name)
    assert all(stage.data.startswith("builtin:") for stage in config.stream)
    growths = plans(config)
    assert len(growths) == 2
    for plan in growths:
        assert plan.new.embed % plan.old.embed and plan.new.layers > plan.old.layers


def test_the_llama_quick_start_grows_queries_and_then_groups() -> None:
    first, second = plans(load_config(FOLDER / "quickstart-llama.yaml"))
    assert first.new.queries > first.old.queries and first.new.kv_groups == first.old.kv_groups
    assert second.new.queries == second.old.queries and second.new.kv_groups > second.old.kv_groups


@pytest.mark.parametrize("name", ["quickstart-bert.yaml", "quickstart-llama.yaml"])
def test_it_fits_two_tensor_parallel_ranks(name: str) -> None:
    check_layout(load_config(FOLDER / name, ["parallel.tp=2"]), 2)


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_sizes(name: str) -> None:
    config = load_config(FOLDER / name)
    growths = plans(config)
    specs = [growths[0].old, *(plan.new for plan in growths)]
    assert [stage.domain for stage in config.stream] == ["wb", "news", "reviews", "bio", "cs"]
    for spec, (layers, heads, millions) in zip(specs, PAPER[name], strict=True):
        assert (spec.layers, spec.heads, spec.embed, spec.mlp) == (layers, heads, 64 * heads, 256 * heads)
        assert parameters(spec) / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize(
    ("name", "peak", "recovery", "reached"),
    [
        # The rates at which recovery is cut off, as the authors' scripts give them.
        ("elle-bert-base.yaml", 5e-4, 5000, 4.08e-4),
        ("elle-bert-large.yaml", 2.5e-4, 1000, 6.25e-5),
        ("elle-gpt-base.yaml", 5e-4, 5000, 4.0e-4),
    ],
)
def test_the_papers_schedules(name: str, peak: float, recovery: int, reached: float) -> None:
    config = load_config(FOLDER / name)
    assert [stage.steps for stage in config.stream] == [62500, *[20000] * 4]
    assert config.batch.global_ == 2048 and config.text_length == 511
    assert config.optim.decay == "all" and config.optim.clip == 0
    for index, stage in enumerate(config.stream[1:], start=1):
        recover, optim = stage.recover, config.stage_optim(index)
        assert recover.steps == recovery and recover.schedule_steps is not None
        last = optim.lr * rate_factor(optim, recover.steps - 1, recover.schedule_steps)
        assert (optim.lr, last) == (peak, pytest.approx(reached, rel=0.01))


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_own_growth_can_be_chosen(name: str) -> None:
    config = load_config(FOLDER / name, ["growth.width=elle", "growth.depth=elle"])
    stage_specs(config, vocabulary_size(config))
    growths = plans(config)
    assert not any(plan.exact for plan in growths)
    assert {plan.moments for plan in growths} == {"reset"}


@pytest.mark.parametrize("name", PAPER)
def test_what_its_comment_says_about_tensor_parallel_works(name: str) -> None:
    with pytest.raises(UserError, match=r"does not divide heads=1[15]"):
        check_layout(load_config(FOLDER / name, ["parallel.tp=2"]), 8)
    advice = re.findall(r"^#   (parallel\.tp=2 \S+)", (FOLDER / name).read_text(encoding="utf-8"), re.MULTILINE)
    assert len(advice) == 2
    for line in advice:
        config = load_config(FOLDER / name, line.split())
        check_layout(config, 8)
        stage_specs(config, vocabulary_size(config))
