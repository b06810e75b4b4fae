"""Grown weights and moments are the same to the last bit under every layout: all strategies, noise included."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from elle_mp.growth.layout import Layout, OldParameters, received_bytes
from elle_mp.growth.tensors import parameter_growths
from elle_mp.models.transformer import Transformer
from elle_mp.ops.random import Bounds
from elle_mp.parallel.sharding import local_tensor, my_bounds, named_specs
from elle_mp.train.optimizer import ShardedAdamW
from tests.distributed_utils import run_distributed
from tests.tiny import (
    apply,
    config_of,
    grid,
    model_of,
    optimizer_of,
    plan_of,
    scatter_moments,
    spec_of,
)

LAYOUTS: dict[str, dict[str, int]] = {
    "one": {},
    "tp2": {"tp": 2},
    "tp4": {"tp": 4},
    "dp_shard2": {"dp_shard": 2},
    "dp_shard4": {"dp_shard": 4},
    "tp2 x dp_shard2": {"tp": 2, "dp_shard": 2},
}
MODELS: dict[str, dict[str, Any]] = {
    "bert": {"norm_eps": 1e-12},
    "gpt": {},
    "llama": {"kv_groups": 4, "heads": 8, "head_dim": 4},
}
WHOLE = {"heads": 8, "mlp": 80, "layers": 4}
LLAMA = {"kv_groups": 8, "heads": 16, "mlp": 80, "layers": 4}
Case = tuple[dict[str, Any], dict[str, Any]]
"""Keys of ``growth``, and what grows."""

LOCAL: dict[str, list[Case]] = {
    # growths that need nothing from a neighbour under any of the layouts
    "bert": [({}, WHOLE), ({"depth": "interleave"}, WHOLE), ({"moments": "asym_reset"}, WHOLE)],
    "gpt": [
        ({}, WHOLE),
        ({"width": "blockdiag"}, WHOLE),
        ({"width": "sparkling"}, WHOLE),
        ({"width": "aki", "depth": "solar"}, {"heads": 8, "layers": 3}),
        ({"width": "zero_pad"}, {"mlp": 80, "layers": 4}),
    ],
    "llama": [
        ({}, LLAMA),
        ({"width": "iso"}, LLAMA),
        ({"width": "zero_pad"}, LLAMA),
        ({"width": "iso", "moments": "asym_reset"}, LLAMA),
        ({}, {"head_dim": 8}),
    ],
}
ANY: dict[str, list[Case]] = {
    # growths of which some parameters are re-cut under some layouts
    "bert": [
        ({"depth": "affine_migrate"}, WHOLE),
        ({"depth": "stack", "width": "elle", "moments": "scaled"}, WHOLE),
        ({"width": "weighted"}, {"width": 44, "seq_len": 20, "vocab": 400}),
    ],
    "gpt": [
        ({"width": "lemon"}, {"width": 44, "heads": 8, "mlp": 60, "layers": 3}),
        ({"width": "weighted"}, {"width": 44, "heads": 8, "seq_len": 20, "vocab": 400}),
        ({"width": "elle", "depth": "elle", "moments": "scaled"}, WHOLE),
    ],
    "llama": [
        ({"width": "iso"}, {"width": 44, "heads": 16, "vocab": 400, "head_dim": 6, "layers": 3}),
        ({"width": "zero_pad"}, {"width": 50, "kv_groups": 8, "heads": 24, "mlp": 60}),
    ],
}


def local_parts(model: Transformer, optimizer: ShardedAdamW) -> dict[str, tuple[Tensor, Bounds]]:
    """This rank's part of every weight and moment, and where it lies in the whole one."""
    out: dict[str, tuple[Tensor, Bounds]] = {}
    for name, spec in named_specs(model):
        bounds = my_bounds(spec, spec.shape(model.sizes), model.grid)
        state = optimizer.moments[name]
        out[name] = local_tensor(model.get_parameter(name)).detach(), bounds
        out[f"{name}.exp_avg"], out[f"{name}.exp_avg_sq"] = (state.first, bounds), (state.second, bounds)
        out[f"{name}.step"] = state.step, ()
    return out


def same_bits(part: Tensor, whole: Tensor, bounds: Bounds) -> bool:
    wanted = whole[tuple(slice(low, high) for low, high in bounds)]
    return part.shape == wanted.shape and part.numpy().tobytes() == wanted.numpy().tobytes()


def collectives() -> int:
    """How many this rank has issued so far, in all process groups."""
    return sum(group._get_sequence_number_for_group() for group in dist.distributed_c10d._world.pg_map)


@dataclass
class Grown:
    """What a growth is like on one rank: which parts are not those of the growth on one rank, bytes and collectives."""

    different: list[str]
    received: int
    collectives: int


def grown_everywhere(family: str, cases: list[Case]) -> tuple[list[dict[str, Grown]], list[dict[str, str]]]:
    """Every growth under every layout, and for each growth a digest of all that it makes on one rank.

    The bytes are also those that ``elle-mp grow --dry-run`` tells beforehand.
    """
    sizes, config = MODELS[family], config_of(family, **MODELS[family])
    wanted: list[dict[str, Tensor]] = []
    seen: list[dict[str, Grown]] = [{} for _ in cases]
    for name, layout in LAYOUTS.items():
        model = model_of(spec_of(family, **sizes), grid(**layout), dtype=torch.float32)
        optimizer = optimizer_of(model)
        scatter_moments(model, optimizer, 5, 7)
        specs = dict(named_specs(model))
        old = OldParameters(specs, {key: spec.shape(model.sizes) for key, spec in specs.items()})
        for index, (growth, grow) in enumerate(cases):
            plan, _ = plan_of(model.spec, config.model, grow, **growth)
            before = collectives()
            new, grown, received = apply(plan, model, optimizer.moments)
            issued = collectives() - before
            planned = received_bytes(parameter_growths(plan, dict(named_specs(new))), old, Layout(**layout))
            assert received == pytest.approx(planned, rel=0.05), (growth, grow, name)
            parts = local_parts(new, grown)
            if name == "one":
                wanted.append({key: part for key, (part, _) in parts.items()})
            different = [key for key, (part, at) in parts.items() if not same_bits(part, wanted[index][key], at)]
            seen[index][name] = Grown(different, received, issued)
    return seen, [{key: sha256(item.numpy().tobytes()).hexdigest() for key, item in each.items()} for each in wanted]


def run_everywhere(family: str, cases: list[Case]) -> Iterator[tuple[str, str, Grown]]:
    """The growth, the layout and what came of it, of every rank, after a look at what all must have in common."""
    ranks = run_distributed(grown_everywhere, 4, family, cases)
    for seen, digests in ranks:
        assert digests == ranks[0][1], "one rank alone grows the same, whichever it is"
        for (growth, grow), layouts, made in zip(cases, seen, digests, strict=True):
            assert len(set(made.values())) > 4
            assert (layouts["one"].received, layouts["one"].collectives) == (0, 0)
            for layout, grown in layouts.items():
                assert grown.different == [], (growth, grow, layout)
                yield f"{growth} {grow}", layout, grown


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("family", LOCAL)
def test_aligned_growth_is_local_and_bitwise_the_same(family: str) -> None:
    for growth, layout, grown in run_everywhere(family, LOCAL[family]):
        assert (grown.received, grown.collectives) == (0, 0), (growth, layout)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("family", ANY)
def test_what_does_not_align_is_re_cut_and_bitwise_the_same(family: str) -> None:
    gathered = set()
    for growth, layout, grown in run_everywhere(family, ANY[family]):
        assert (grown.received == 0) == (grown.collectives == 0), (growth, layout)
        gathered |= {growth} if grown.received else set()
    assert len(gathered) == len(ANY[family]), "each under some layout"
