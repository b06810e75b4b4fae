"""The declarations: shapes from axes, what tensor parallelism cuts, that every model is declared whole."""

from __future__ import annotations

from math import prod

import pytest
import torch

from elle_mp.axes import TENSOR_PARALLEL_AXES, Axis, Dim, ParamSpec, Role
from elle_mp.parallel.sharding import named_specs
from tests.tiny import FAMILIES, grid, model_of, spec_of

SIZES = {
    Axis.EMBED: 6,
    Axis.KV_GROUPS: 3,
    Axis.SLOT: 4,
    Axis.HEAD_DIM: 5,
    Axis.MLP: 7,
    Axis.GATE: 2,
    Axis.VOCAB: 11,
}


def test_a_dimension_is_the_product_of_its_axes() -> None:
    qkv = ParamSpec((Dim((Axis.KV_GROUPS, Axis.SLOT, Axis.HEAD_DIM), Role.WRITE), Dim((Axis.EMBED,), Role.READ)))
    assert qkv.shape(SIZES) == (60, 6)
    assert qkv.dims[0].outer is Axis.KV_GROUPS
    assert ParamSpec(()).shape(SIZES) == ()


@pytest.mark.parametrize(
    ("dims", "cut"),
    [
        (((Axis.KV_GROUPS, Axis.SLOT, Axis.HEAD_DIM), (Axis.EMBED,)), 0),
        (((Axis.EMBED,), (Axis.KV_GROUPS, Axis.QUERIES, Axis.HEAD_DIM)), 1),
        (((Axis.MLP, Axis.GATE), (Axis.EMBED,)), 0),
        (((Axis.EMBED,), (Axis.MLP,)), 1),
        (((Axis.VOCAB,), (Axis.EMBED,)), 0),
        (((Axis.EMBED,),), None),
        (((Axis.POSITIONS,), (Axis.EMBED,)), None),
        (((Axis.DOMAINS,), (Axis.TOKENS,), (Axis.EMBED,)), None),
    ],
)
def test_tensor_parallelism_cuts_the_outermost_axis(dims: tuple[tuple[Axis, ...], ...], cut: int | None) -> None:
    assert ParamSpec(tuple(Dim(axes) for axes in dims)).tensor_parallel_dim == cut


def test_embed_and_head_dim_are_never_cut() -> None:
    assert not {Axis.EMBED, Axis.HEAD_DIM, Axis.SLOT, Axis.QUERIES, Axis.GATE} & TENSOR_PARALLEL_AXES


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_a_model_is_declared_with_its_shape(family: str) -> None:
    spec = spec_of(family, layers=2)
    model = model_of(spec, grid(), torch.float64)
    declared = dict(named_specs(model))
    parameters = dict(model.named_parameters())
    assert list(declared) == list(parameters) or set(declared) == set(parameters)
    for name, parameter in parameters.items():
        assert declared[name].shape(spec.axes) == tuple(parameter.shape), name
        # An axis that is cut stands outermost, or an ordinary Shard would cut through its units.
        for dim in declared[name].dims:
            assert not set(dim.axes[1:]) & TENSOR_PARALLEL_AXES, name
    total = sum(prod(parameter.shape) for parameter in parameters.values())
    assert total == _counted_by_hand(family)


def _counted_by_hand(family: str) -> int:
    d, f, v, layers, positions, prompts = 32, 40, 320, 2, 12, 2 * 2
    embeddings = v * d + prompts * d
    if family == "llama":
        layer = d * (32 + 2 * 16) + d * d + 2 * f * d + d * f + 2 * d  # two groups of keys and values
        return embeddings + layers * layer + d + v * d
    layer = 3 * d * d + 3 * d + d * d + d + f * d + f + d * f + d + 4 * d
    total = embeddings + positions * d + layers * layer + 2 * d
    return total + (d * d + d + 2 * d + v if family == "bert" else 0)
