"""Every layout draws the same weights and grows them alike (that it trains alike: tests/distributed/test_parity.py)."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch

from elle_mp.models.build import Precision, empty_model
from elle_mp.parallel.sharding import initialise
from tests.distributed_utils import run_distributed
from tests.tiny import (
    FAMILIES,
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

LAYOUTS = {
    "tp2": {"tp": 2},
    "dp_shard2": {"dp_shard": 2},
    "dp_replicate2": {"dp_replicate": 2},
    "tp2 x dp_shard2": {"tp": 2, "dp_shard": 2},
}
RANKS = {name: prod(layout.values()) for name, layout in LAYOUTS.items()}
GROW = {"layers": 3, "heads": 6, "mlp": 60}


def grown_tensors(
    family: str,
    layout: dict[str, int],
    growth: dict[str, Any],
    grow: dict[str, int],
    sizes: dict[str, Any] | None = None,
) -> Any:
    """Grown weights and moments, whole, with the bytes received and the collectives issued while growing."""
    from torch.distributed.tensor.debug import CommDebugMode

    sizes = sizes or {}
    model = model_of(spec_of(family, **sizes), grid(**layout), dtype=torch.float32)
    optimizer = optimizer_of(model)
    scatter_moments(model, optimizer, 5, 7)
    plan, _ = plan_of(model.spec, config_of(family, **sizes).model, grow, **growth)
    with CommDebugMode() as counter:
        new, grown, received = apply(plan, model, optimizer.moments)
    return weights(new) | moments(grown), received, counter.get_total_counts()


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["tp2", "dp_shard2", "tp2 x dp_shard2"])
@pytest.mark.parametrize("family", ["bert", "gpt", "llama"])
def test_growth_is_local_and_bitwise_the_same_under_every_layout(family: str, layout: str) -> None:
    """Noise included; cuts that align with the maps need no collective (growth.md, section 2)."""
    wanted, _, _ = run_distributed(grown_tensors, 1, family, {}, {}, GROW | {"heads": 8})[0]
    for got, received, collectives in run_distributed(
        grown_tensors, RANKS[layout], family, LAYOUTS[layout], {}, GROW | {"heads": 8}
    ):
        for name, tensor in wanted.items():
            assert torch.equal(got[name], tensor), name
        # Four shards cut llama's two groups in half, and a group's queries grow: those rows come from a neighbour.
        aligned = (family, layout) != ("llama", "tp2 x dp_shard2")
        assert (received == 0, collectives == 0) == (aligned, aligned)


@pytest.mark.distributed
def test_cuts_that_do_not_align_are_gathered_and_counted() -> None:
    """The paper's random maps leave their rank: still the same tensors, and the record says what it cost."""
    growth = {"width": "elle", "depth": "elle", "moments": "scaled"}
    wanted, _, _ = run_distributed(grown_tensors, 1, "gpt", {}, growth, {"heads": 6})[0]
    for got, received, collectives in run_distributed(grown_tensors, 2, "gpt", {"tp": 2}, growth, {"heads": 6}):
        assert received > 0 and collectives > 0
        for name, tensor in wanted.items():
            assert torch.equal(got[name], tensor), name


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("family", "sizes"), [("bert", {"heads": 3, "mlp": 21}), ("llama", {"heads": 3, "kv_groups": 3})]
)
def test_odd_sizes_under_sharding_are_gathered_where_they_must(family: str, sizes: dict[str, Any]) -> None:
    """FSDP2's chunks of odd rows do not map onto each other: the tensors are the same, noise included."""
    grow = {"heads": 5, "mlp": 67, "layers": 3} | ({"kv_groups": 5} if family == "llama" else {})
    wanted, none, _ = run_distributed(grown_tensors, 1, family, {}, {}, grow, sizes)[0]
    assert none == 0
    for got, received, collectives in run_distributed(grown_tensors, 2, family, {"dp_shard": 2}, {}, grow, sizes):
        assert received > 0 and collectives > 0
        for name, tensor in wanted.items():
            assert torch.equal(got[name], tensor), name


def drawn(layout: dict[str, int]) -> dict[str, torch.Tensor]:
    """A new model of each family; their weights, whole."""
    place, out = grid(**layout), {}
    for family in FAMILIES:
        sizes = {"kv_groups": 4} if family == "llama" else {}
        model = empty_model(spec_of(family, **sizes), place, Precision(torch.float32, torch.float32))
        initialise(model, 3)
        out.update({f"{family} {name}": tensor for name, tensor in weights(model).items()})
    return out


@pytest.mark.distributed
def test_initial_weights_are_the_same_to_the_last_bit() -> None:
    """And so what a rank holds is what the declarations say: the values are drawn for just those entries."""
    wanted = run_distributed(drawn, 1, {})[0]
    for family in FAMILIES:
        assert 0.019 < float(wanted[f"{family} token_table"].std()) < 0.021
        # 0.02 / sqrt(2 layers), two layers
        assert float(wanted[f"{family} layers.0.mlp.out_weight"].std()) == pytest.approx(0.01, rel=0.1)
    for layout in (*LAYOUTS.values(), {"tp": 4}, {"dp_shard": 4}):
        for got in run_distributed(drawn, prod(layout.values()), layout):
            assert got.keys() == wanted.keys()
            for name, tensor in wanted.items():
                assert torch.equal(got[name], tensor), name
