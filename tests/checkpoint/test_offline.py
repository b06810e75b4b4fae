"""A checkpoint grown block by block holds the very bits of the live growth, whatever layout wrote or reads it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from elle_mp.checkpoint.offline import OfflineGrowth, grow_checkpoint, parts
from elle_mp.checkpoint.store import CheckpointStore
from elle_mp.checkpoint.stream_reader import StoredTensors
from elle_mp.checkpoint.stream_writer import blocks
from elle_mp.errors import UserError
from elle_mp.growth.maps import Fill
from elle_mp.growth.plan import GrowthPlan
from elle_mp.growth.tensors import TensorGrowth, parameter_growths
from elle_mp.models.build import Precision, empty_model
from elle_mp.models.declarations import declarations
from elle_mp.models.transformer import Transformer
from elle_mp.ops.random import Bounds
from elle_mp.train.optimizer import ShardedAdamW
from tests.distributed_utils import run_distributed
from tests.tiny import (
    apply,
    config_of,
    grid,
    model_of,
    moments,
    optimizer_of,
    plan_of,
    scatter_moments,
    spec_of,
    weights,
)

LAYOUTS: dict[str, dict[str, int]] = {"one": {}, "tp2": {"tp": 2}, "dp_shard2": {"dp_shard": 2}}
READ_UNDER = {"one": "one", "tp2": "dp_shard2", "dp_shard2": "tp2"}
BLOCK = 3000
"""Bytes: a few rows of a matrix, and less than any old matrix."""


@dataclass(frozen=True)
class Case:
    """A growth of a tiny model, which may have been through another one."""

    family: str
    growth: dict[str, Any]
    grow: dict[str, int]
    sizes: dict[str, Any] = field(default_factory=dict)
    before: tuple[dict[str, Any], dict[str, int]] | None = None


UNEVEN = {"width": 44, "heads": 8, "mlp": 60, "layers": 3}
DOUBLED = {"heads": 8, "mlp": 80, "layers": 4}
CASES: dict[str, Case] = {
    "weighted": Case("gpt", {"width": "weighted"}, UNEVEN),
    "weighted again": Case(
        "gpt", {"width": "weighted"}, {"width": 50, "layers": 4}, before=({"width": "weighted"}, UNEVEN)
    ),
    "lemon": Case("gpt", {"width": "lemon"}, UNEVEN),
    "blockdiag": Case("gpt", {"width": "blockdiag"}, DOUBLED),
    "asym_reset": Case("gpt", {"moments": "asym_reset"}, DOUBLED),
    "reset": Case("gpt", {"moments": "reset"}, DOUBLED),
    "longer": Case("gpt", {}, {"head_dim": 12, "width": 32, "seq_len": 30, "vocab": 400}),
    "nothing": Case("gpt", {}, {}),
    "aki": Case("gpt", {"width": "aki", "depth": "solar"}, {"heads": 6, "layers": 3}),
    "sparkling": Case("gpt", {"width": "sparkling"}, DOUBLED),
    "elle": Case("gpt", {"width": "elle", "depth": "elle"}, DOUBLED),
    "gate": Case("bert", {"depth": "gate"}, DOUBLED, {"norm_eps": 1e-12}),
    "affine_migrate": Case("bert", {"depth": "affine_migrate"}, DOUBLED, {"norm_eps": 1e-12}),
    "iso": Case("llama", {"width": "iso"}, {"width": 44, "heads": 8, "layers": 3, "mlp": 60}),
    "zero_pad": Case("llama", {"width": "zero_pad"}, {"width": 50, "kv_groups": 4, "heads": 12, "mlp": 60}),
    "longer heads": Case("llama", {}, {"head_dim": 12, "width": 32, "vocab": 400, "layers": 3}),
}  # fmt: skip


def old_model(case: Case, layout: str) -> tuple[Transformer, ShardedAdamW, GrowthPlan]:
    """The model that is grown, its optimizer with something in it, and the plan."""
    model = model_of(spec_of(case.family, **case.sizes), grid(**LAYOUTS[layout]), dtype=torch.float32)
    optimizer, sizes = optimizer_of(model), config_of(case.family, **case.sizes).model
    if case.before is not None:
        growth, grow = case.before
        plan, sizes = plan_of(model.spec, sizes, grow, **growth)
        model, optimizer, _ = apply(plan, model, optimizer.moments)
    scatter_moments(model, optimizer, 5, 7)
    return model, optimizer, plan_of(model.spec, sizes, case.grow, **case.growth)[0]


def stored(model: Transformer, optimizer: ShardedAdamW) -> dict[str, Tensor]:
    """What a run's checkpoint holds."""
    tensors = {f"model.{name}": item.detach() for name, item in model.named_parameters()}
    if model.norm_stats is not None:
        tensors["model.norm_stats"] = model.norm_stats
    return tensors | {f"optim.{name}": item for name, item in optimizer.tensors().items()}


def digests(model: Transformer, optimizer: ShardedAdamW) -> dict[str, str]:
    """A digest of every weight, moment and step, and of the norms' statistics."""
    tensors = weights(model) | moments(optimizer)
    if model.norm_stats is not None:
        tensors["norm_stats"] = model.norm_stats
    return {name: hashlib.sha256(item.numpy().tobytes()).hexdigest() for name, item in tensors.items()}


def live() -> dict[str, dict[str, str]]:
    """What growing the live model makes of it, on one rank."""
    out = {}
    for name, case in CASES.items():
        model, optimizer, plan = old_model(case, "one")
        new, grown, _ = apply(plan, model, optimizer.moments)
        out[name] = digests(new, grown)
    return out


def saved_grown_loaded(folder: str, written: str, names: list[str]) -> dict[str, dict[str, str]]:
    """The same through files: saved under one layout, grown without a model, loaded under another layout."""
    out = {}
    for name in names:
        model, optimizer, plan = old_model(CASES[name], written)
        CheckpointStore(Path(folder, name, "old")).save("a", stored(model, optimizer), {"k": 1})
        growth = OfflineGrowth(plan, StoredTensors(Path(folder, name, "old", "a")), declarations(plan.new))
        store, reported = CheckpointStore(Path(folder, name, "new")), list[int]()
        grow_checkpoint(growth, store, "b", {"k": 2}, BLOCK, reported.append)
        new = empty_model(plan.new, grid(**LAYOUTS[READ_UNDER[written]]), Precision(torch.float32, torch.float32))
        grown = optimizer_of(new)
        store.load("b", stored(new, grown))
        out[name] = digests(new, grown)
    return out


@pytest.fixture(scope="module")
def wanted() -> dict[str, dict[str, str]]:
    """The live growths' digests."""
    return run_distributed(live, 1)[0]


@pytest.mark.distributed
@pytest.mark.parametrize("written", LAYOUTS)
def test_offline_growth_is_the_live_growth_bitwise(
    written: str, wanted: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    """All of them in one process; in two, half from one layout and half from another."""
    processes = 1 if written == "one" else 2
    names = {"one": [*CASES], "tp2": [*CASES][::2], "dp_shard2": [*CASES][1::2]}[written]
    for got in run_distributed(saved_grown_loaded, processes, str(tmp_path), written, names):
        for name in names:
            assert got[name].keys() == wanted[name].keys()
            assert [tensor for tensor in wanted[name] if got[name][tensor] != wanted[name][tensor]] == [], name
    for name in names:
        sizes = [path.stat().st_size for path in (tmp_path / name / "new" / "b").glob("*.distcp")]
        assert len(sizes) == processes and min(sizes) > 0.3 * max(sizes), "every process has written its share"


def largest_reads(entries: int) -> dict[str, tuple[int, int]]:
    """For each case: the most old values that a part of a block is made of, and that a whole block would be."""
    out = {}
    for name, case in CASES.items():
        plan = plan_of(
            spec_of(case.family, **case.sizes), config_of(case.family, **case.sizes).model, case.grow, **case.growth
        )[0]
        cut, whole = 0, 0
        for growth in parameter_growths(plan, declarations(plan.new)).values():
            for bounds in blocks(growth.shape, 1, entries) if growth.source is not None else ():
                count = torch.zeros([stop - start for start, stop in bounds], dtype=torch.int8)
                for part in parts(growth, bounds, growth.reads, entries):
                    place = tuple(
                        slice(low - first, high - first) for (low, high), (first, _) in zip(part, bounds, strict=True)
                    )
                    count[place] += 1
                    cut = max(cut, values_read(growth, part))
                    check_copies_together(growth, part)
                assert bool((count == 1).all()), (name, growth.name)
                whole = max(whole, values_read(growth, bounds))
        out[name] = (cut, whole)
    return out


def values_read(growth: TensorGrowth, bounds: Bounds) -> int:
    return sum(prod(stop - start for start, stop in needed) for needed in growth.needs(bounds).values())


def check_copies_together(growth: TensorGrowth, part: Bounds) -> None:
    """Noise cancels over the copies of a unit, so they have to be made together."""
    item = growth.dims[-1]
    if growth.noise is not None and item is not None:
        copied = item.fill == int(Fill.COPY)
        inside = torch.zeros(growth.shape[-1], dtype=torch.bool)
        inside[part[-1][0] : part[-1][1]] = True
        assert not set(item.item.index[copied & inside].tolist()) & set(item.item.index[copied & ~inside].tolist())


@pytest.mark.distributed
def test_a_block_made_of_much_is_made_in_parts() -> None:
    """Channels that hold a mean, biases that take over a norm's, random maps, a table's wrap: memory stays bounded."""
    (seen,) = run_distributed(largest_reads, 1, 500)
    assert max(cut for cut, _ in seen.values()) <= 500
    for name in ("lemon", "affine_migrate", "elle", "longer"):
        assert seen[name][1] > 1000, name


def refused(folder: str) -> list[str]:
    """What is said of plans that start from another model, and of a checkpoint without what the plan needs."""
    case = CASES["weighted"]
    model, optimizer, _ = old_model(case, "one")
    tensors = stored(model, optimizer)
    store = CheckpointStore(Path(folder, "old"))
    store.save("a", tensors, {})
    store.save("b", {name: item for name, item in tensors.items() if not name.startswith("model.layers.1.")}, {})
    moments_left = {name: item for name, item in tensors.items() if name != "optim.final_norm.bias.exp_avg_sq"}
    store.save("c", moments_left, {})
    out = []
    for name, family, sizes in (
        ("a", "gpt", {"mlp": 48}),
        ("a", "gpt", {"layers": 3}),
        ("a", "bert", {}),
        ("b", "gpt", {}),
        ("c", "gpt", {}),
    ):
        plan, _ = plan_of(spec_of(family, **sizes), config_of(family, **sizes).model, {"heads": 8, "layers": 4})
        growth = OfflineGrowth(plan, StoredTensors(store.folder / name), declarations(plan.new))
        new = CheckpointStore(Path(folder, "new"))
        with pytest.raises(UserError) as raised:
            grow_checkpoint(growth, new, "b", {}, BLOCK, lambda count: None)
        assert not Path(folder, "new").exists()
        out.append(str(raised.value))
    for name in ("a", "b", "c"):
        store.verify(name)
    return out


@pytest.mark.distributed
def test_a_plan_of_another_model_is_refused(tmp_path: Path) -> None:
    (said,) = run_distributed(refused, 1, str(tmp_path))
    assert all("\n" not in text for text in said)
    for text, part in zip(
        said,
        (
            "[40, 32], and the plan starts from [48, 32]",
            "layers.2",
            "of another model?",
            "model.layers.1.",
            "exp_avg_sq",
        ),
        strict=True,
    ):
        assert part in text, said
