"""What a plan refuses, and where it puts layers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from elle_mp.errors import UserError
from elle_mp.growth.plan import GrowthPlan
from tests.tiny import config_of, plan_of, spec_of

REFUSED: dict[str, tuple[str, dict[str, int], dict[str, Any], str]] = {
    "replicate, no multiple, LayerNorm": (
        "gpt",
        {"heads": 6},
        {"width": "replicate"},
        r"^growth\.width=replicate: width 32 -> 48 is no whole multiple; weighted is exact there$",
    ),
    "replicate, no multiple, RMSNorm": ("llama", {"heads": 6}, {"width": "replicate"}, r"iso is exact there$"),
    "iso under LayerNorm": ("bert", {"heads": 8}, {"width": "iso"}, r"^growth\.width=iso: .*bert.*weighted would do$"),
    "weighted under RMSNorm": (
        "llama",
        {"heads": 8},
        {"width": "weighted"},
        r"^growth\.width=weighted: .*iso would do$",
    ),
    "gate before norms": (
        "gpt",
        {"layers": 3},
        {"depth": "gate"},
        r"^growth\.depth=gate: .*pre-norm.*zero_out is exact",
    ),
    "zero_out behind norms": (
        "bert",
        {"layers": 3},
        {"depth": "zero_out"},
        r"^growth\.depth=zero_out: .*post-LN.*gate is$",
    ),
    "more than a doubling": (
        "gpt",
        {"layers": 5},
        {"depth": "elle"},
        r"^growth\.depth=elle: .*2 are left, not 3; at most 4 layers would do$",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case: str) -> None:
    family, grow, growth, pattern = REFUSED[case]
    with pytest.raises(UserError, match=pattern) as refused:
        plan_of(spec_of(family), config_of(family).model, grow, **growth)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("family", ["bert", "gpt", "llama"])
@pytest.mark.parametrize(("old", "new"), [(2, 3), (2, 4), (3, 4), (3, 7), (6, 8), (8, 12)])
def test_layers_stay_in_order_and_originals_come_first(family: str, old: int, new: int) -> None:
    plan, _ = plan_of(spec_of(family, layers=old), config_of(family, layers=old).model, {"layers": new})
    originals = [source for source, added in zip(plan.layer_source, plan.inserted, strict=True) if not added]
    assert originals == list(range(old))
    assert list(plan.layer_source) == sorted(plan.layer_source)
    assert sum(plan.inserted) == new - old
    if new % old == 0:
        assert plan.layer_source == tuple(layer // (new // old) for layer in range(new))
    gated = tuple(index for index, added in enumerate(plan.inserted) if added)
    assert plan.new.gated == (gated if family == "bert" else ())


def test_gates_follow_their_layers() -> None:
    spec, sizes = spec_of("bert"), config_of("bert").model
    first, sizes = plan_of(spec, sizes, {"layers": 3})
    assert first.inserted == (False, True, False) and first.new.gated == (1,)
    second, _ = plan_of(first.new, sizes, {"layers": 4})
    assert second.layer_source == (0, 0, 1, 2) and second.new.gated == (1, 2)


def test_a_plan_is_a_pure_function_of_its_seed_and_goes_to_json() -> None:
    spec, sizes = spec_of("gpt", layers=4), config_of("gpt", layers=4).model
    grow = {"heads": 6, "layers": 6, "mlp": 57}
    one, _ = plan_of(spec, sizes, grow, width="elle", depth="elle")
    two, _ = plan_of(spec, sizes, grow, width="elle", depth="elle")
    assert json.dumps(one.to_json()) == json.dumps(two.to_json())
    for left, right in zip(one.layer_maps, two.layer_maps, strict=True):
        assert left.keys() == right.keys()
        assert all(left[axis].index.equal(right[axis].index) for axis in left)
    again = GrowthPlan.from_json(json.loads(json.dumps(one.to_json())))
    assert again.summary() == one.summary() and again.to_json() == one.to_json()
    assert (again.old, again.new, again.placement) == (one.old, one.new, one.placement)
    record = one.summary()
    sizes_in_record = ("layers", "heads", "kv_groups", "embed", "mlp")
    assert tuple(record["from"][key] for key in sizes_in_record) == (4, 4, 4, 32, 40)
    assert tuple(record["to"][key] for key in sizes_in_record) == (6, 6, 6, 48, 57)
    assert len(record["inserted"]) == 2 and one.moments == "reset"
