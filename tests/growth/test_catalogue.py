"""The whole catalogue: each strategy with each family it takes, whole multiples or not, tied or not, fp64 and fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from elle_mp.errors import UserError
from elle_mp.growth.depth import DepthStrategy
from elle_mp.growth.plan import GrowthPlan
from elle_mp.growth.registry import names
from elle_mp.growth.width import WidthStrategy
from elle_mp.models.transformer import Transformer
from elle_mp.train.optimizer import ShardedAdamW
from tests.tiny import MODELS, apply, config_of, grid, logits, model_of, optimizer_of, plan_of, spec_of, text, train

WHOLE = {"heads": 8, "mlp": 80, "layers": 4}
UNEVEN = {"heads": 6, "mlp": 57, "layers": 3}
EXACT_WIDTHS: dict[str, tuple[tuple[str, ...], bool]] = {
    # strategy: families it takes, and whether it takes any width
    "replicate": (("bert", "gpt", "llama"), False),
    "blockdiag": (("bert", "gpt", "llama"), False),
    "sparkling": (("bert", "gpt", "llama"), False),
    "weighted": (("bert", "gpt"), True),
    "lemon": (("gpt",), True),
    "iso": (("llama",), True),
    "zero_pad": (("llama",), True),
}
EXACT_DEPTHS: dict[str, tuple[str, ...]] = {
    "zero_out": ("gpt", "llama"),
    "gate": ("bert",),
    "affine_migrate": ("bert",),
}
WIDTH_CASES = [
    (model, width, whole, precision)
    for model, sizes in MODELS.items()
    for width, (families, any_width) in EXACT_WIDTHS.items()
    for whole in (True, False)
    for precision in ("float64", "float32")
    if sizes["family"] in families and (whole or any_width)
]
DEPTH_CASES = [
    (model, depth, whole, precision)
    for model, sizes in MODELS.items()
    for depth, families in EXACT_DEPTHS.items()
    for whole in (True, False)
    for precision in ("float64", "float32")
    if sizes["family"] in families
]


def sizes_of(model: str, **changes: Any) -> dict[str, Any]:
    return MODELS[model] | changes


def trained(sizes: dict[str, Any], dtype: torch.dtype) -> tuple[Transformer, ShardedAdamW]:
    """A model after real steps."""
    out = model_of(spec_of(**sizes), grid(), dtype)
    optimizer = optimizer_of(out)
    train(out, optimizer, 2)
    return out, optimizer


def grown_by(
    sizes: dict[str, Any], grow: dict[str, Any], dtype: torch.dtype = torch.float64, **growth: Any
) -> tuple[GrowthPlan, float, float]:
    """The plan, the largest change of a logit, and that change relative to the largest logit; it trains afterwards."""
    old, optimizer = trained(sizes, dtype)
    plan, _ = plan_of(old.spec, config_of(**sizes).model, grow, **growth)
    tokens, domain, _ = text(3, seed=99)
    before = logits(old, tokens, domain)
    assert float(before.abs().max()) > 0.1
    new, new_optimizer, received = apply(plan, old, optimizer.moments)
    assert received == 0
    after = logits(new, tokens, domain)[..., : before.shape[-1]]
    difference = float((before - after).abs().max())
    assert all(loss < 20 for loss in train(new, new_optimizer, 1, seed=5))
    assert float((after - logits(new, tokens, domain)[..., : before.shape[-1]]).abs().max()) > 1e-5
    return plan, difference, difference / float(before.abs().max())


def check_exact(plan: GrowthPlan, absolute: float, relative: float, dtype: torch.dtype) -> None:
    assert plan.exact and plan.reason is None
    if dtype == torch.float64:
        assert absolute < 1e-10
    else:
        assert relative < 1e-5


@pytest.mark.parametrize(("model", "width", "whole", "precision"), WIDTH_CASES)
def test_exact_width(model: str, width: str, whole: bool, precision: str) -> None:
    dtype = getattr(torch, precision)
    result = grown_by(sizes_of(model), WHOLE if whole else UNEVEN, dtype, width=width)
    assert result[0].width == width
    check_exact(*result, dtype)


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("model", ["bert", "gpt", "gpt untied"])
def test_zero_pad_of_heads_and_mlp_under_layer_norm(model: str, precision: str) -> None:
    """The residual stream stays; heads and MLP units are added that nobody reads."""
    dtype = getattr(torch, precision)
    check_exact(*grown_by(sizes_of(model, width=32), UNEVEN, dtype, width="zero_pad"), dtype)


@pytest.mark.parametrize(("model", "depth", "whole", "precision"), DEPTH_CASES)
def test_exact_depth(model: str, depth: str, whole: bool, precision: str) -> None:
    dtype = getattr(torch, precision)
    eps = {"norm_eps": 1e-12} if depth == "affine_migrate" else {}
    result = grown_by(sizes_of(model, **eps), {"layers": 4 if whole else 5}, dtype, depth=depth)
    assert result[0].depth == depth
    check_exact(*result, dtype)


AXES: dict[str, dict[str, Any]] = {
    "width alone": {"width": 48},
    "heads alone": {"heads": 6},
    "head_dim alone": {"head_dim": 12},
    "mlp alone": {"mlp": 57},
    "layers alone": {"layers": 3},
    "positions alone": {"seq_len": 20},
    "vocab alone": {"vocab": 400},
    "all": {"width": 44, "heads": 6, "head_dim": 12, "mlp": 57, "layers": 3, "seq_len": 20, "vocab": 400},
}
GROUPED: dict[str, dict[str, Any]] = {
    "groups alone": {"kv_groups": 4, "heads": 8},
    "queries of a group alone": {"heads": 6},
    "all, groups too": AXES["all"] | {"kv_groups": 3, "heads": 9},
}


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("axis", [*AXES, *GROUPED])
@pytest.mark.parametrize("model", MODELS)
def test_each_axis_alone_and_all_together(model: str, axis: str, precision: str) -> None:
    grouped = MODELS[model].get("kv_groups") is not None
    if (axis in GROUPED and not grouped) or (axis in ("all", "heads alone") and grouped):
        return
    dtype = getattr(torch, precision)
    result = grown_by(sizes_of(model, width=32), {**AXES, **GROUPED}[axis], dtype)
    check_exact(*result, dtype)
    (plan, _, _) = result
    changed = {
        key
        for key in ("embed", "heads", "head_dim", "mlp", "layers", "positions", "vocab_size")
        if getattr(plan.old, key) != getattr(plan.new, key)
    }
    wanted = {
        {"width": "embed", "seq_len": "positions", "vocab": "vocab_size"}.get(key, key)
        for key in {**AXES, **GROUPED}[axis]
    } - {"kv_groups"}
    assert changed == wanted


INEXACT: list[tuple[str, str, dict[str, Any], dict[str, int]]] = [
    *[
        (model, f"width {name}", {"width": name}, UNEVEN)
        for model in ("bert", "gpt", "llama GQA")
        for name in ("sparkling", "aki", "elle")
    ],
    *[
        (model, f"depth {name}", {"depth": name}, {"layers": 4})
        for model in ("bert", "gpt", "llama GQA")
        for name in ("stack", "interleave", "solar", "elle")
    ],
    ("bert", "depth affine_migrate", {"depth": "affine_migrate"}, {"layers": 3}),
]


@pytest.mark.parametrize(("model", "what", "growth", "grow"), INEXACT)
def test_what_is_not_exact_says_so_and_is_never_chosen_by_auto(
    model: str, what: str, growth: dict[str, str], grow: dict[str, int]
) -> None:
    plan, absolute, _ = grown_by(sizes_of(model), grow, **growth)
    assert not plan.exact and plan.reason is not None and what in plan.reason
    assert plan.summary()["exact"] is False and plan.summary()["reason"] == plan.reason
    assert absolute > (1e-3 if "affine" not in what else 1e-10)
    chosen, _ = plan_of(spec_of(**MODELS[model]), config_of(**MODELS[model]).model, grow)
    assert chosen.exact


def test_the_tables_above_name_the_whole_catalogue() -> None:
    inexact = {value for _, _, growth, _ in INEXACT for value in growth.values()}
    assert {*EXACT_WIDTHS, "aki", "elle"} == set(names(WidthStrategy))
    assert {*EXACT_DEPTHS, *inexact} & set(names(DepthStrategy)) == set(names(DepthStrategy))


@pytest.mark.parametrize(
    ("growth", "message"),
    [
        ({"width": "replicat"}, "growth.width=replicat: there is no such strategy; did you mean replicate?"),
        ({"depth": "zzz"}, "growth.depth=zzz: there is no such strategy; one of auto, zero_out, "),
    ],
)
def test_a_strategy_that_does_not_exist(growth: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as refused:
        plan_of(spec_of("gpt"), config_of("gpt").model, {"heads": 8}, **growth)
    assert str(refused.value).startswith(message)
