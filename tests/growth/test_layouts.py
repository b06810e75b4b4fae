"""Grown weights and moments are the same to the last bit under every layout: all strategies, noise included."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch

from elle_mp.growth.layout import Layout, OldParameters, received_bytes
from elle_mp.growth.tensors import parameter_growths
from elle_mp.parallel.sharding import named_specs
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
LOCAL: dict[str, list[tuple[dict[str, Any], dict[str, int]]]] = {
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
ANY: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
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


def digests(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}


def grown_everywhere(family: str, cases: list[tuple[dict[str, Any], dict[str, int]]]) -> Any:
    """For each growth and layout: a digest of every grown tensor, the bytes received, the collectives issued.

    The bytes are also those that ``elle-mp grow --dry-run`` tells beforehand.
    """
    from torch.distributed.tensor.debug import CommDebugMode

    sizes, out = MODELS[family], []
    for growth, grow in cases:
        seen = {}
        for name, layout in LAYOUTS.items():
            model = model_of(spec_of(family, **sizes), grid(**layout), dtype=torch.float32)
            optimizer = optimizer_of(model)
            scatter_moments(model, optimizer, 5, 7)
            plan, _ = plan_of(model.spec, config_of(family, **sizes).model, grow, **growth)
            with CommDebugMode() as counter:
                new, grown, received = apply(plan, model, optimizer.moments)
            specs = dict(named_specs(model))
            old = OldParameters(specs, {key: spec.shape(model.sizes) for key, spec in specs.items()})
            planned = received_bytes(parameter_growths(plan, dict(named_specs(new))), old, Layout(**layout))
            assert received == pytest.approx(planned, rel=0.05), (growth, grow, name)
            seen[name] = (digests(weights(new) | moments(grown)), received, counter.get_total_counts())
        out.append(seen)
    return out


def check_equal(seen: dict[str, Any], label: str) -> None:
    wanted = seen["one"][0]
    assert len(set(wanted.values())) > 4
    for layout, (got, _, _) in seen.items():
        assert [name for name in wanted if got[name] != wanted[name]] == [], (label, layout)


@pytest.mark.distributed
@pytest.mark.parametrize("family", LOCAL)
def test_aligned_growth_is_local_and_bitwise_the_same(family: str) -> None:
    for ranks in run_distributed(grown_everywhere, 4, family, LOCAL[family]):
        for (growth, grow), seen in zip(LOCAL[family], ranks, strict=True):
            check_equal(seen, f"{growth} {grow}")
            for layout, (_, received, collectives) in seen.items():
                assert (received, collectives) == (0, 0), (growth, grow, layout)


@pytest.mark.distributed
@pytest.mark.parametrize("family", ANY)
def test_what_does_not_align_is_re_cut_and_bitwise_the_same(family: str) -> None:
    for ranks in run_distributed(grown_everywhere, 4, family, ANY[family]):
        for (growth, grow), seen in zip(ANY[family], ranks, strict=True):
            check_equal(seen, f"{growth} {grow}")
            assert seen["one"][1:] == (0, 0)
            assert any(received > 0 and collectives > 0 for _, received, collectives in seen.values())
            assert all((received == 0) == (collectives == 0) for _, received, collectives in seen.values())
