"""The configuration: what it accepts, and the one line it gives for everything else."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from elle_mp.config import Config, GrowConfig, ModelConfig, grown
from elle_mp.config_file import load_config, parse_config
from elle_mp.config_layout import check_layout
from elle_mp.errors import UserError

BASE = """\
run: {dir: runs/x, seed: 1}
model: {family: gpt, layers: 4, heads: 4, head_dim: 32, seq_len: 128}
stream:
  - {domain: a, data: "builtin:docs", steps: 2}
  - {domain: b, data: "builtin:code", steps: 2, grow: {layers: 6, heads: 6}}
"""

DESIGN_EXAMPLE = """\
run:       {dir: runs/quickstart, seed: 1}
model:     {family: gpt, layers: 4, heads: 4, head_dim: 32, seq_len: 128, dropout: 0.0}   # width = heads * head_dim
tokenizer: {kind: sentencepiece, vocab_size: 4096}        # trained on the first domain when no path is given
prompts:   {tokens: 1}
memory:    {tokens: 200000, replay: 0.1}
growth:    {width: auto, depth: auto, moments: scaled, noise_db: 20}
optim:     {lr: 1.0e-3, betas: [0.9, 0.98], weight_decay: 0.01, clip: 1.0, schedule: linear, warmup: 0.08}
batch:     {global: 64, micro: 16}
precision: bf16            # bf16 | fp32 | fp64 (tests)
parallel:  {tp: 1, pp: 1, dp_shard: 1, dp_replicate: auto, sequence_parallel: false, schedule: 1f1b, engine: fsdp}
checkpoint: {every: 200, keep: 2}
eval:      {every: 200, batches: 20}
stream:
  - {domain: docs, data: "builtin:docs", steps: 200}
  - {domain: code, data: "builtin:code", steps: 150, grow: {layers: 6, heads: 6}, recover: {steps: 30}}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def complaint(folder: Path, text: str, *overrides: str, world: int | None = None) -> str:
    """The one line that a configuration is refused with."""
    with pytest.raises(UserError) as refused:
        config = load_config(write(folder, text), overrides)
        if world is not None:
            check_layout(config, world)
    message = str(refused.value)
    assert "\n" not in message
    return message.replace(f"{folder}/", "")


def test_the_design_example_parses_as_it_stands(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, DESIGN_EXAMPLE))
    check_layout(config, 1)
    check_layout(config, 2)
    assert config.optim.lr == 1e-3 and config.optim.betas == (0.9, 0.98)
    assert config.batch.global_ == 64 and config.batch.micro == 16
    assert config.growth.moments == "scaled" and config.growth.noise_db == 20
    assert (config.stage_model(0).embed, config.stage_model(1).embed) == (128, 192)
    assert (config.stage_model(0).mlp_size, config.stage_model(1).mlp_size) == (512, 768)
    assert config.stage_model(1).layers == 6
    assert config.stream[1].recover.steps == 30 and config.text_length == 127
    saved = config.model_dump(mode="json", by_alias=True)
    assert parse_config(saved) == config


# (what is changed in BASE, overrides, what the message must hold)
REFUSED: dict[str, tuple[tuple[str, str], tuple[str, ...], str]] = {
    "unknown key": (
        ("seed: 1", "sed: 1"),
        (),
        r"^run\.yaml:1: run\.sed: unknown key; did you mean 'seed'\?$",
    ),
    "unknown section": (("run:", "runn:"), (), r"^run\.yaml:1: runn: unknown key; did you mean 'run'\?$"),
    "unknown key, nothing near": (
        ("seed: 1", "zzz: 1"),
        (),
        r"^run\.yaml:1: run\.zzz: unknown key; known here: dir, seed, data$",
    ),
    "unknown key in a stage": (
        ("layers: 6,", "layrs: 6,"),
        (),
        r"^run\.yaml:5: stream\.1\.grow\.layrs: unknown key; did you mean 'layers'\?$",
    ),
    "unknown key in a stage's override": (
        ("steps: 2}", "steps: 2, optim: {lrr: 1}}"),
        (),
        r"^run\.yaml:4: stream\.0\.optim\.lrr: unknown key; did you mean 'lr'\?$",
    ),
    "bad value in a stage's override": (
        ("steps: 2}", "steps: 2, batch: {micro: 0}}"),
        (),
        r"^run\.yaml:4: stream\.0\.batch\.micro: .*greater than 0, not 0$",
    ),
    "unknown family": (
        ("family: gpt", "family: gtp"),
        (),
        r"^run\.yaml:2: model\.family: .*'gpt' or 'llama', not 'gtp'$",
    ),
    "missing key": (('data: "builtin:docs", ', ""), (), r"^run\.yaml:4: stream\.0\.data is missing$"),
    "wrong type": (
        ("layers: 4", "layers: four"),
        (),
        r"^run\.yaml:2: model\.layers: .*integer.*, not 'four'$",
    ),
    "shrinks in heads": (
        ("heads: 6", "heads: 3"),
        (),
        r"^run\.yaml:5: stream\.1\.grow\.heads=3 is smaller than 4.*4 or more$",
    ),
    "shrinks in layers": (
        ("layers: 6", "layers: 3"),
        (),
        r"^run\.yaml:5: stream\.1\.grow\.layers=3 is smaller than 4.*4 or more$",
    ),
    "shrinks in mlp": (
        ("heads: 6}", "mlp: 100}"),
        (),
        r"^run\.yaml:5: stream\.1\.grow\.mlp=100 is smaller than 512.*512 or more$",
    ),
    "shrinks in width": (
        ("heads: 6}", "width: 64}"),
        (),
        r"^run\.yaml:5: stream\.1\.grow\.width=64 is smaller than 128 .*128 or more$",
    ),
    "shrinks in head_dim": (
        ("heads: 6}", "head_dim: 16}"),
        (),
        r"^run\.yaml:5: stream\.1\.grow\.head_dim=16 is smaller than 32 .*32 or more$",
    ),
    "shrinks in positions": (
        ("heads: 6}", "seq_len: 64}"),
        (),
        r"^run\.yaml:5: stream\.1\.grow\.seq_len=64 is smaller than 128 .*128 or more$",
    ),
    "shrinks in ids": (
        ("heads: 6}", "vocab: 4200}"),
        ("model.vocab=5000",),
        r"^run\.yaml:5: stream\.1\.grow\.vocab=4200 is smaller than 5000 .*5000 or more$",
    ),
    "fewer ids than pieces": (
        ("seq_len: 128", "seq_len: 128, vocab: 4000"),
        (),
        r"^run\.yaml:2: model\.vocab=4000 is smaller than tokenizer\.vocab_size=4096; 4096 or more would do$",
    ),
    "fewer ids than pieces after growth": (
        ("heads: 6}", "vocab: 500}"),
        (),
        r"^run\.yaml:5: stream\.1\.grow\.vocab=500 is smaller than tokenizer\.vocab_size=4096",
    ),
    "odd head_dim under RoPE after growth": (
        ("family: gpt", "family: llama"),
        ("stream.1.grow={head_dim: 33}",),
        r"stream\.1\.grow: head_dim=33 is odd.*34 would do$",
    ),
    "domain named twice": (
        ("domain: b", "domain: a"),
        (),
        r"^run\.yaml:5: domain 'a' is named twice \(stages 0 and 1\); give each stage its own name$",
    ),
    "domain with a space": (
        ("domain: b", "domain: b c"),
        (),
        r"^run\.yaml:5: stream\.1\.domain: .*, not 'b c'$",
    ),
    "kv_groups outside llama": (
        ("heads: 4", "heads: 4, kv_groups: 2"),
        (),
        r"^run\.yaml:2: model: kv_groups is for the llama",
    ),
    "kv_groups does not divide": (
        ("family: gpt, layers: 4, heads: 4", "family: llama, layers: 4, heads: 4, kv_groups: 3"),
        (),
        r"^run\.yaml:2: model: kv_groups=3 does not divide heads=4; 2 or 4 would$",
    ),
    "kv_groups does not divide after growth": (
        ("family: gpt, layers: 4, heads: 4", "family: llama, layers: 4, heads: 4, kv_groups: 4"),
        (),
        r"^run\.yaml:5: stream\.1\.grow: kv_groups=4 does not divide heads=6; 3 or 6 would$",
    ),
    "fewer queries a group": (
        ("family: gpt, layers: 4, heads: 4", "family: llama, layers: 4, heads: 4, kv_groups: 2"),
        ("stream.1.grow.kv_groups=6",),
        r"stream\.1\.grow: 6 heads over 6 kv_groups are 1 a group, fewer than 2 before; heads=12 would do$",
    ),
    "odd head_dim under RoPE": (
        ("family: gpt, layers: 4, heads: 4, head_dim: 32", "family: llama, layers: 4, heads: 4, head_dim: 7"),
        (),
        r"^run\.yaml:2: model: head_dim=7 is odd.*8 would do$",
    ),
    "untied bert": (("family: gpt", "family: bert, tied: false"), (), r"^run\.yaml:2: model: tied=false"),
    "mlp twice": (
        ("heads: 4", "heads: 4, mlp: 8, mlp_ratio: 2"),
        (),
        r"^run\.yaml:2: model: mlp and mlp_ratio are both given",
    ),
    "prompt leaves no text": (
        ("seq_len: 128", "seq_len: 2"),
        (),
        r"prompts\.tokens=1 leaves 1 text positions of model\.seq_len=2",
    ),
    "recovery without memory": (
        ("steps: 2}", "steps: 2, recover: {steps: 3}}"),
        (),
        r"^run\.yaml:4: stream\.0\.recover: the first domain has no memory",
    ),
    "not a number of steps": (
        ("", ""),
        ("stream.0.steps=1.5",),
        r"^override stream\.0\.steps=1\.5: stream\.0\.steps: .*integer",
    ),
    "infinite rate": (("", ""), ("optim.lr=.inf",), r"^override optim\.lr=\.inf: optim\.lr: .*finite"),
    "beta out of range": (
        ("", ""),
        ("optim.betas=[0.9, 1.5]",),
        r"optim: betas\[1\]=1\.5 is not in \[0, 1\)",
    ),
    "inverse_sqrt without warm-up": (
        ("", ""),
        ("optim.schedule=inverse_sqrt", "optim.warmup=0"),
        r"optim: schedule inverse_sqrt needs warmup above 0",
    ),
    "override without a value": (
        ("", ""),
        ("model.layers",),
        r"^override 'model\.layers': give it as key=value",
    ),
    "override without a key": (("", ""), ("=3",), r"^override '=3': give it as key=value"),
    "override of an unknown key": (
        ("", ""),
        ("model.heds=3",),
        r"^override model\.heds=3: model\.heds: unknown key; did you mean 'heads'\?$",
    ),
    "override of a wrong type": (
        ("", ""),
        ("model.layers=x",),
        r"^override model\.layers=x: model\.layers: .*not 'x'$",
    ),
    "override of a stage that is not there": (
        ("", ""),
        ("stream.7.steps=3",),
        r"^override stream\.7\.steps=3: stream has entries 0 to 1$",
    ),
    "override that is not YAML": (
        ("", ""),
        ("model.layers=[1",),
        r"^override 'model\.layers=\[1': the value is not YAML$",
    ),
    "no stage": (("", ""), ("stream=[]",), r"^override stream=\[\]: stream: .*at least 1 item"),
    "key twice": (("stream:", "run: {dir: y}\nstream:"), (), r"^run\.yaml:3: key 'run' is given twice$"),
    "key twice inside": (("seed: 1", "seed: 1, seed: 2"), (), r"^run\.yaml:1: key 'seed' is given twice$"),
    "not YAML": (("run: {", "run: ["), (), r"^run\.yaml:\d: not YAML: "),
    "not a mapping": ((BASE, "- a\n"), (), r"^run\.yaml: the configuration is empty"),
    "empty": ((BASE, ""), (), r"^run\.yaml: the configuration is empty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_that_says_where_and_what_would_do(case: str, tmp_path: Path) -> None:
    (before, after), overrides, pattern = REFUSED[case]
    assert before in BASE
    message = complaint(tmp_path, BASE.replace(before, after, 1) if before else BASE, *overrides)
    assert re.search(pattern, message), message


def test_a_missing_file_a_folder_and_a_binary_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file: .*none\.yaml$"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match=r"is a folder; give a file$"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00abc")
    with pytest.raises(UserError, match=r"binary\.yaml: not UTF-8"):
        load_config(tmp_path / "binary.yaml")


# (ranks, overrides, what the message must hold)
LAYOUTS: dict[str, tuple[int, tuple[str, ...], str]] = {
    "tp does not divide the heads": (
        3,
        ("parallel.tp=3",),
        r"^parallel\.tp=3 does not divide heads=4 of stage 0 \(a\); heads=3 or 6 or tp=2 or 4 would do$",
    ),
    "tp does not divide the heads after growth": (
        4,
        ("parallel.tp=4",),
        r"^parallel\.tp=4 does not divide heads=6 of stage 1 \(b\); heads=4 or 8 or tp=3 or 6 would do$",
    ),
    "tp does not divide the mlp": (
        2,
        ("parallel.tp=2", "model.mlp=33", "stream.1.grow.mlp=34"),
        r"^parallel\.tp=2 does not divide mlp=33 of stage 0 \(a\); mlp=32 or 34 ",
    ),
    "tp does not divide the vocabulary": (
        5,
        ("parallel.tp=5", "model.heads=5", "stream.1.grow.heads=10"),
        r"^parallel\.tp=5 does not divide vocab_multiple=128 of stage 0",
    ),
    "layout does not divide the ranks": (
        3,
        ("parallel.tp=2",),
        r"^parallel: tp=2 x dp_shard=1 = 2 ranks .* 3 that run; start 2 or 4",
    ),
    "layout is not the ranks": (
        2,
        ("parallel.tp=2", "parallel.dp_replicate=2"),
        r"^parallel: .* = 4 ranks, but 2 run; start 4, or set dp_replicate=auto$",
    ),
    "a stage's own layout": (
        2,
        ("stream.1.parallel.tp=4",),
        r"^stream\.1\.parallel: tp=4 .* the 2 that run; start 4 ",
    ),
    "batch does not divide": (
        3,
        (),
        r"^batch\.global=64 does not divide over 3 data-parallel ranks; 63 or 66 would$",
    ),
    "batch does not divide over shards and replicas": (
        6,
        ("parallel.dp_shard=2",),
        r"^batch\.global=64 does not divide over 6 data-parallel ranks; 60 or 66 would$",
    ),
    "micro does not divide": (
        2,
        ("batch.global=20", "batch.micro=4"),
        r"^batch\.micro=4 does not divide the 10 sequences of a rank; 2 or 5 would$",
    ),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_a_layout_that_does_not_fit_is_refused(case: str, tmp_path: Path) -> None:
    world, overrides, pattern = LAYOUTS[case]
    message = complaint(tmp_path, BASE, *overrides, world=world)
    assert re.search(pattern, message), message


def test_what_the_messages_offer_is_accepted(tmp_path: Path) -> None:
    path = write(tmp_path, BASE)
    for world, overrides in (
        (2, ["parallel.tp=2"]),
        (4, ["parallel.tp=2", "parallel.dp_shard=2"]),
        (3, ["batch.global=66", "batch.micro=22"]),
        (2, ["batch.global=20", "batch.micro=5"]),
        (4, ["parallel.tp=4", "stream.1.grow.heads=8"]),
        (2, ["stream.1.parallel.tp=2"]),
    ):
        check_layout(load_config(path, overrides), world)


def test_overrides_reach_every_depth(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, BASE),
        [
            "optim.lr=5e-4",
            "growth.noise_db=null",
            "stream.1.grow.layers=8",
            "stream.0.optim.lr=2e-3",
            "batch.global=8",
        ],
    )
    assert config.optim.lr == 5e-4 and config.growth.noise_db is None and config.batch.global_ == 8
    assert config.stage_model(1).layers == 8 and config.stage_model(0).layers == 4
    assert config.stage_optim(0).lr == 2e-3 and config.stage_optim(1).lr == 5e-4
    assert config.stage_optim(0).betas == config.optim.betas


def test_sizes_follow_the_width_unless_they_are_given() -> None:
    llama = ModelConfig(family="llama", heads=4, head_dim=32)
    assert llama.mlp_size == 344  # 8/3 * 128 = 341.3, rounded up to a multiple of 8
    assert grown(llama, GrowConfig(heads=6)).mlp_size == 512
    assert ModelConfig(heads=4, head_dim=32, mlp_ratio=0.3).mlp_size == 40  # 38.4
    given = grown(ModelConfig(mlp=100), GrowConfig(heads=8))
    assert given.mlp_size == 100 and given.heads == 8
    assert grown(ModelConfig(mlp_ratio=2.0), GrowConfig(mlp=300)).mlp_size == 300
    assert grown(ModelConfig(family="llama", heads=4, kv_groups=2), GrowConfig(heads=8)).groups == 2
    assert grown(ModelConfig(), GrowConfig(heads=8)).groups == 8


def test_the_width_follows_the_heads_until_it_is_given() -> None:
    free = ModelConfig(heads=4, head_dim=32)
    assert grown(free, GrowConfig(heads=6)).embed == 192
    assert grown(free, GrowConfig(head_dim=48)).embed == 192
    wide = grown(free, GrowConfig(width=160))
    assert (wide.embed, wide.heads, wide.head_dim, wide.mlp_size) == (160, 4, 32, 640)
    longer = grown(wide, GrowConfig(head_dim=64, heads=8))
    assert (longer.embed, longer.heads, longer.head_dim, longer.mlp_size) == (160, 8, 64, 640)
    llama = ModelConfig(family="llama", heads=4, head_dim=32, width=96)
    assert (llama.embed, llama.mlp_size) == (96, 256)


def test_a_stage_has_its_own_text_length() -> None:
    tree = {
        "model": {"seq_len": 32},
        "prompts": {"tokens": 2},
        "stream": [
            {"domain": "a", "data": "a", "steps": 1},
            {"domain": "b", "data": "b", "steps": 1, "grow": {"seq_len": 48}},
            {"domain": "c", "data": "c", "steps": 1},
        ],
    }
    config = parse_config(tree)
    assert [config.stage_text_length(stage) for stage in range(3)] == [30, 46, 46]
    assert config.text_length == 30


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys, elle_mp, elle_mp.axes, elle_mp.config, elle_mp.config_file, elle_mp.errors;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_values_do_not_change_once_read() -> None:
    config = Config.model_validate({"stream": [{"domain": "a", "data": "x", "steps": 1}]})
    with pytest.raises(ValueError, match="frozen"):
        config.optim.lr = 1.0
