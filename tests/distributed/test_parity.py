"""Every layout trains, through a growth, the model that one process trains: losses, norms, every gradient and weight.

fp64 shows that a layout computes the same function: nothing but rounding is left, and that is 1e-14 or so where 1e-9 is
asked for. fp32 and bf16 show that it does so in the precisions of real runs. DeepSpeed has no fp64.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

from elle_mp.ops.random import Bounds
from tests.distributed.training import STEPS, Comparison, Setting, Trained, compare, keep
from tests.distributed_utils import run_distributed
from tests.shared_work import made_once
from tests.tiny import FAMILIES

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

FSDP: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "dp_shard2": {"dp_shard": 2},
    "dp_replicate2": {"dp_replicate": 2},
    "sp": {"tp": 2, "sequence_parallel": True},
    "cp2": {"cp": 2},
    "recompute selective": {"dp_shard": 2, "recompute": "selective"},
    "recompute full": {"dp_replicate": 2, "recompute": "full"},
    "gpipe": {"pp": 2, "schedule": "gpipe"},
    "1f1b": {"pp": 2, "schedule": "1f1b", "recompute": "full"},
    "interleaved_1f1b": {"pp": 2, "schedule": "interleaved_1f1b"},
    "zero_bubble": {"pp": 2, "schedule": "zero_bubble"},
    "zbv": {"pp": 2, "schedule": "zbv"},
    "split by hand": {"pp": 2, "split": [1, 3]},
    "tp2 x pp2": {"tp": 2, "pp": 2},
    "tp2 x dp_shard2": {"tp": 2, "dp_shard": 2},
    "pp2 x dp_shard2": {"pp": 2, "dp_shard": 2, "schedule": "zero_bubble"},
    "tp2 x pp2 x dp_shard2": {"tp": 2, "pp": 2, "dp_shard": 2, "schedule": "zbv"},
}
ZERO: dict[str, dict[str, Any]] = {
    "zero 1": {"engine": "deepspeed", "zero_stage": 1},
    "zero 2": {"engine": "deepspeed", "zero_stage": 2, "dp_shard": 2},
    "zero 3": {"engine": "deepspeed", "zero_stage": 3, "dp_shard": 2},
    "zero 1 x tp2": {"engine": "deepspeed", "zero_stage": 1, "tp": 2, "dp_shard": 2},
}
MORE: dict[str, dict[str, Any]] = {
    "pp3": {"pp": 3},
    "split by time": {"pp": 2, "split": "measured"},
    "pp2 x dp_replicate2": {"pp": 2, "dp_replicate": 2},
}
LAYOUTS = FSDP | MORE | (ZERO if importlib.util.find_spec("deepspeed") else {})

Case = tuple[str, str, str]
"""Family, precision, layout."""

EVERY: list[Case] = [(family, "fp64", layout) for family in FAMILIES for layout in FSDP]
EVERY += [(family, "fp32", layout) for family in FAMILIES for layout in LAYOUTS if layout in ZERO]
EVERY += [("gpt", "fp64", layout) for layout in MORE]
# Rounding needs every layout and every family, but not each with each.
EVERY += [(FAMILIES[index % 3], "fp32", layout) for index, layout in enumerate(FSDP)]
EVERY += [(FAMILIES[(index + 1) % 3], "bf16", layout) for index, layout in enumerate(LAYOUTS) if layout not in MORE]

TOLERANCES = {"fp64": {"": 1e-9}, "fp32": {"": 1e-4, "gradient": 1e-3}}
"""Of a kind, or of all others. gpt at tp2 x pp2 passes a steep place in its last step: 1.4e-4 or 2.8e-4 of the gradient
of a layer's qkv_bias, with the compiled attention and PyTorch's; every other fp32 case stays below 2e-5."""
SPREADS = 5
"""Of two seeds' rounding, for bf16. A layout rounds in every step, not in the weights that it begins with alone: tp2 of
FSDP2 and that of ZeRO were seen 2.8 of them away in the norm of one step of twenty (10 %), 1.4 in everything else."""


def ranks_of(layout: str) -> int:
    return max(2, prod(LAYOUTS[layout].get(axis, 1) for axis in ("tp", "pp", "cp", "dp_shard", "dp_replicate")))


def setting_of(case: Case) -> Setting:
    """Pipelines have four layers, then five: one each at first where a rank has two stages, then never as many."""
    family, precision, layout = case
    return Setting(family, precision, 4 if "pp" in LAYOUTS[layout] else 2)


def reference(setting: Setting, jitter: int = 0) -> dict[str, Any]:
    """What one process computed, and the file it lies in."""
    name = f"parity-{setting.family}-{setting.precision}-{setting.layers}-{jitter}"
    folder = made_once(name, lambda path: run_distributed(keep, 1, str(path / "run.pt"), setting, jitter))
    return {"file": str(folder / "run.pt")} | torch.load(folder / "run.pt", mmap=True, weights_only=False)


def run(cases: Iterable[Case]) -> dict[Case, list[Trained]]:
    """What every rank tells of each case. All have as many ranks and run in one job."""
    cases = list(cases)
    (ranks,) = {ranks_of(layout) for _, _, layout in cases}
    runs = [(setting_of(case), LAYOUTS[case[2]], reference(setting_of(case))["file"]) for case in cases]
    told = run_distributed(compare, ranks, runs, timeout=60 + 20 * len(runs))
    return {case: [rank[index] for rank in told] for index, case in enumerate(cases)}


def check(case: Case, told: list[Trained], tolerance: dict[str, float]) -> list[str]:
    """What is not as it is in one process."""
    wanted, wrong = reference(setting_of(case)), []
    found = deviations(wanted, told)
    for kind, (size, where) in found.items():
        if not size <= tolerance.get(kind, tolerance[""]):
            wrong.append(f"{case}: {kind} differs by {size:.2g} {where}")
    for kind in {key.split("/")[0] for key in wanted["tensors"]}:
        last = f"{kind}/{2 * STEPS - 1}" if kind == "gradient" else kind
        for key, tensor in wanted["tensors"].items():
            if key.startswith(f"{last}/"):
                name = key.removeprefix(f"{last}/")
                blocks = set().union(*(rank.held[kind].get(name, set()) for rank in told))
                if volume(blocks) != tensor.numel():
                    wrong.append(f"{case}: ranks hold {volume(blocks)} of {tensor.numel()} entries of {key}")
    return wrong


def deviations(wanted: dict[str, Any], told: list[Trained]) -> dict[str, tuple[float, str]]:
    """The largest differences of losses, norms (relative) and tensors (relative to their largest entries)."""
    out = {}
    for kind in ("losses", "norms"):
        for rank in told:
            pairs = enumerate(zip(getattr(rank, kind), wanted[kind], strict=True))
            out[kind] = max(out.get(kind, (0.0, "")), *((abs(a - b) / b, f"in step {step}") for step, (a, b) in pairs))
    for rank in told:
        for kind, worst in rank.worst.items():
            out[kind] = max(out.get(kind, (0.0, "")), worst)
    return out


def volume(blocks: Iterable[Bounds]) -> int:
    return sum(prod(stop - start for start, stop in block) for block in blocks)


def spread(setting: Setting) -> dict[str, float]:
    """What rounding alone does to one process's run: two seeds move every initial weight by up to half a unit in the
    last place of bf16, which that rounds up or down or away."""
    plain, out = reference(setting), {"": 0.0}
    for jitter in (1, 2):
        other = reference(setting, jitter)
        seen = Comparison(plain["tensors"])
        by_kind: dict[str, dict[str, list[tuple[Bounds, Tensor]]]] = {}
        for key, tensor in other["tensors"].items():
            what, name = key.rsplit("/", 1)
            by_kind.setdefault(what, {})[name] = [(tuple((0, size) for size in tensor.shape), tensor)]
        for what, tensors in by_kind.items():
            seen.see(what, tensors)
        moved = deviations(plain, [Trained(other["losses"], other["norms"], seen.worst)])
        out |= {kind: max(out.get(kind, 0.0), size) for kind, (size, _) in moved.items()}
    return out


def group(precision: str, families: Iterable[str], ranks: int) -> list[Case]:
    return [case for case in EVERY if case[1] == precision and case[0] in families and ranks_of(case[2]) == ranks]


GROUPS = {f"{family} fp64 {ranks}": group("fp64", [family], ranks) for family in FAMILIES for ranks in (2, 4)}
GROUPS |= {
    f"{precision} {ranks}": group(precision, FAMILIES, ranks) for precision in ("fp32", "bf16") for ranks in (2, 4)
}
GROUPS["3"] = [case for case in EVERY if ranks_of(case[2]) == 3]
GROUPS["8"] = [case for case in EVERY if ranks_of(case[2]) == 8]


@pytest.mark.parametrize("name", GROUPS)
def test_every_layout_trains_as_one_process_does(name: str) -> None:
    wrong = []
    for case, told in run(GROUPS[name]).items():
        family, precision, layout = case
        if precision == "bf16":
            tolerance = {kind: SPREADS * size for kind, size in spread(setting_of(case)).items()}
        else:
            tolerance = TOLERANCES[precision]
        wrong += check(case, told, tolerance)
        if "pp" in LAYOUTS[layout]:
            before, after = (sorted(part for rank in told for part in rank.layers[when]) for when in (0, 1))
            assert len({len(part) for part in after}) > 1, "stages are uneven"
            if layout == "1f1b" and family == "gpt":
                assert any(rank.received for rank in told), "a layer changed its rank"
            if layout == "split by hand":
                assert before == [[0], [1, 2, 3]]
            if layout == "split by time":
                assert (before, after) == ([[0, 1, 2], [3]], [[0], [1, 2, 3, 4]])
    assert wrong == []


def test_each_case_is_in_a_group() -> None:
    assert sorted(case for cases in GROUPS.values() for case in cases) == sorted(EVERY)
