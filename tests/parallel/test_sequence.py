"""Cut sequences: which positions a rank holds, the collectives, and training as on one rank."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from elle_mp.data.batches import Batch
from elle_mp.errors import UserError
from elle_mp.models.spec import ModelSpec
from elle_mp.models.transformer import IGNORED
from elle_mp.ops.dropout import DropoutKey
from elle_mp.parallel import collectives
from elle_mp.parallel.sequence import behind, below, between, context_layout, part_of, select
from elle_mp.parallel.sharding import local_tensor
from elle_mp.train.trainer import Trainer, rows_of
from tests.distributed_utils import run_distributed
from tests.tiny import gradients, grid, model_of, optimizer_of, spec_of, text, weights

ROWS, STEPS = 4, 3


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_ranks_share_positions_and_pairs_evenly(ranks: int, causal: bool) -> None:
    length = 48
    layout = context_layout(length, ranks, causal)
    held = [list(chain(*runs)) for runs in layout]
    assert sorted(chain(*held)) == list(range(length))
    assert all(positions == sorted(positions) and len(positions) == length // ranks for positions in held)
    if causal:
        # A query at position s has s + 1 keys.
        assert len({sum(position + 1 for position in positions) for positions in held}) == 1


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
def test_a_part_has_equally_long_runs(ranks: int) -> None:
    for runs in (*context_layout(48, 2, True), *context_layout(48, 2, False)):
        parts = [part_of(runs, rank, ranks) for rank in range(ranks)]
        held = [list(chain(*part)) for part in parts]
        assert list(chain(*held)) == list(chain(*runs))
        assert all(len(positions) == 24 // ranks for positions in held)
        assert all(len({len(run) for run in part}) == 1 for part in parts)


def test_selection() -> None:
    runs = (range(2, 5), range(9, 12))
    x = torch.arange(12).expand(2, -1)
    assert select(x, runs).tolist() == [[2, 3, 4, 9, 10, 11]] * 2
    assert select(x, (range(0, 12),)) is x and select(x, ()).shape == (2, 0)
    assert select(x.t(), runs, 0)[:, 0].tolist() == [2, 3, 4, 9, 10, 11]
    assert below(runs, 4) == (range(2, 4),) and behind(runs, 4) == (range(0, 1), range(5, 8))
    assert below(runs, 2) == () and behind(runs, 0) == runs and behind(runs, 12) == ()
    assert between(runs, 2, 4) == (range(4, 5), range(9, 10)) and between(runs, 3, 3) == ()


def test_lengths_that_do_not_divide() -> None:
    with pytest.raises(UserError, match="4 chunks, which do not divide 10 positions"):
        context_layout(10, 2, True)
    with pytest.raises(UserError, match=r"parallel.tp=4 .* 6 positions"):
        part_of((range(0, 6),), 0, 4)


# --- collectives: y = A x and dx = A^T dy for the linear map A over all ranks, stated on whole tensors ---

BATCH, LENGTH, WIDTH = 3, 12, 5


def cut(x: Tensor, rank: int, ranks: int) -> Tensor:
    return x.chunk(ranks, dim=1)[rank]


def every_collective(dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs and gradients of each collective on this rank, of inputs by rank."""
    rank, ranks, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    part, whole = (BATCH, LENGTH // ranks, WIDTH), (BATCH, LENGTH, WIDTH)
    layout = context_layout(LENGTH, ranks, causal=True)
    calls: dict[str, Any] = {
        "copy": (collectives.copy_to_tp, whole),
        "reduce": (collectives.reduce_from_tp, whole),
        "gather": (collectives.gather_sequence, part),
        "scatter": (collectives.reduce_scatter_sequence, whole),
        "whole": (collectives.gather_sequence_whole, part),
        "split": (collectives.split_sequence, whole),
        "runs": (lambda x, group: collectives.gather_runs(x, group, layout), part),
    }
    out = {}
    for name, (call, shape) in calls.items():
        x = value("x", name, rank, shape).to(dtype).requires_grad_()
        y = call(x, group)
        upstream = value("y", name, 0 if name in ("whole", "reduce") else rank, y.shape).to(dtype)
        (gradient,) = torch.autograd.grad(y, x, upstream)
        out |= {f"{name} y": y.detach(), f"{name} dx": gradient}
    out |= linear(rank, part, dtype)
    return out


def linear(rank: int, part: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """The fused gather and product against the two, one after the other."""
    group = dist.group.WORLD
    out = {}
    for name in ("fused", "plain"):
        x = value("x", "linear", rank, part).to(dtype).requires_grad_()
        weight = value("w", "linear", rank, (7, WIDTH)).to(dtype).requires_grad_()
        bias = value("b", "linear", rank, (7,)).to(dtype).requires_grad_()
        if name == "fused":
            y = collectives.gather_linear(x, weight, bias, group)
        else:
            y = F.linear(collectives.gather_sequence(x, group), weight, bias)
        upstream = value("y", "linear", rank, y.shape).to(dtype)
        found = (y.detach(), *torch.autograd.grad(y, (x, weight, bias), upstream))
        out |= {f"{name} {key}": item for key, item in zip(("y", "dx", "dw", "db"), found, strict=True)}
    return out


def value(kind: str, name: str, rank: int, shape: Any) -> Tensor:
    seed = sum(ord(letter) for letter in kind + name) * 100 + rank
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_collectives_are_the_linear_maps_they_say(ranks: int) -> None:
    part, whole = (BATCH, LENGTH // ranks, WIDTH), (BATCH, LENGTH, WIDTH)
    layout = context_layout(LENGTH, ranks, causal=True)
    everyone = range(ranks)

    def total(kind: str, name: str, shape: Any) -> Tensor:
        return torch.stack([value(kind, name, rank, shape) for rank in everyone]).sum(0)

    def joined(kind: str, name: str) -> Tensor:
        return torch.cat([value(kind, name, rank, part) for rank in everyone], 1)

    in_order = torch.empty(whole, dtype=torch.float64)
    for rank, runs in enumerate(layout):
        in_order[:, list(chain(*runs))] = value("x", "runs", rank, part)
    for rank, got in enumerate(run_distributed(every_collective, ranks, torch.float64)):
        wanted = {
            "copy y": value("x", "copy", rank, whole),
            "copy dx": total("y", "copy", whole),
            "reduce y": total("x", "reduce", whole),
            "reduce dx": value("y", "reduce", 0, whole),
            "gather y": joined("x", "gather"),
            "gather dx": cut(total("y", "gather", whole), rank, ranks),
            "scatter y": cut(total("x", "scatter", whole), rank, ranks),
            "scatter dx": joined("y", "scatter"),
            "whole y": joined("x", "whole"),
            "whole dx": cut(value("y", "whole", 0, whole), rank, ranks),
            "split y": cut(value("x", "split", rank, whole), rank, ranks),
            "split dx": joined("y", "split"),
            "runs y": in_order,
            "runs dx": select(total("y", "runs", whole), layout[rank]),
        }
        wanted |= {f"fused {key}": got[f"plain {key}"] for key in ("y", "dx", "dw", "db")}
        for name, expected in wanted.items():
            torch.testing.assert_close(got[name], expected, rtol=1e-14, atol=1e-14, msg=name)
            assert got[name].is_contiguous(), name


@pytest.mark.distributed
def test_sums_of_bf16_are_rounded_once() -> None:
    """Parts of three ranks added in fp32: a rounding after each would lose the small ones."""
    ranks = 3
    got = run_distributed(every_collective, ranks, torch.bfloat16)
    parts = [value("x", "scatter", rank, (BATCH, LENGTH, WIDTH)).bfloat16() for rank in range(ranks)]
    exact = torch.stack([item.float() for item in parts]).sum(0).bfloat16()
    for rank in range(ranks):
        assert torch.equal(got[rank]["scatter y"], cut(exact, rank, ranks))


# --- training ---

LAYOUTS: dict[str, dict[str, Any]] = {
    "sp tp4": {"tp": 4, "sequence_parallel": True},
    "cp2 x sp tp2": {"cp": 2, "tp": 2, "sequence_parallel": True},
    "cp2 x dp_shard2": {"cp": 2, "dp_shard": 2},
    "sp tp2, recomputed": {"tp": 2, "sequence_parallel": True, "recompute": "full"},
    "pp2 x sp tp2": {"pp": 2, "tp": 2, "sequence_parallel": True},
    "pp2 x cp2": {"pp": 2, "cp": 2},
}
CASES = [(family, layout) for family in ("gpt", "bert", "llama") for layout in list(LAYOUTS)[:2]]
CASES += [("gpt", "cp2 x dp_shard2"), ("bert", "sp tp2, recomputed"), ("gpt", "pp2 x sp tp2"), ("llama", "pp2 x cp2")]


def spec_for(family: str) -> ModelSpec:
    """Sizes that four ranks divide; the prompt fills the first chunk of four and reaches into the second."""
    sizes = {"dropout": 0.1, "heads": 8, "seq_len": 16} | ({"kv_groups": 4} if family == "llama" else {})
    spec = replace(spec_of(family, **sizes), prompt_tokens=5)
    return replace(spec, gated=(1,)) if family == "bert" else spec


def global_batch(spec: ModelSpec, step: int) -> Batch:
    """Targets unevenly spread over rows and positions; every third step the first rows predict nothing at all."""
    tokens, domain, targets = text(ROWS, seed=step, length=spec.text_length)
    targets[0, 1:] = IGNORED
    targets[1, spec.text_length // 2 :] = IGNORED
    targets[2, ::3] = IGNORED
    if step % 3 == 0:
        targets[: ROWS // 2] = IGNORED
    return Batch(tokens, targets, domain, torch.arange(ROWS) + ROWS * step)


def train(family: str, layout: dict[str, Any]) -> dict[str, Any]:
    """A few steps; losses, norms, every gradient and the weights after them, whole (gradients from the first rank)."""
    place = grid(**layout)
    spec = spec_for(family)
    model = model_of(spec, place, spread=0.05)
    optimizer = optimizer_of(model, lr=3e-3)
    trainer = Trainer(model, optimizer, micro=2, dropout_seed=3)
    seen: dict[str, Any] = {"loss": [], "norm": [], "gradients": []}
    inner = optimizer.step

    def recording(*arguments: Any) -> float:
        seen["gradients"].append(gradients(model))
        return inner(*arguments)

    optimizer.step = recording  # type: ignore[method-assign]
    for step in range(STEPS):
        first, last = rows_of(place, ROWS)
        result = trainer.step(global_batch(spec, step).rows(first, last), 1.0)
        seen["loss"].append(result.loss)
        seen["norm"].append(result.grad_norm)
    seen["weights"] = weights(model)
    # What replicas have is gathered: a copy from each pipeline stage goes to the test.
    place_in_stage = (place.rank(axis) for axis in ("dp_replicate", "shard", "tp"))
    return {key: seen[key] for key in ("loss", "norm")} if any(place_in_stage) else seen


@pytest.fixture(scope="module")
def one_rank() -> Any:
    """The same training on one rank, once for each family."""
    known: dict[str, dict[str, Any]] = {}

    def get(family: str) -> dict[str, Any]:
        if family not in known:
            known[family] = run_distributed(train, 1, family, {})[0]
        return known[family]

    return get


@pytest.mark.distributed
@pytest.mark.parametrize(("family", "layout"), CASES)
def test_training_is_that_of_one_rank(family: str, layout: str, one_rank: Any) -> None:
    wanted = one_rank(family)
    ranks = 4 if " x " in layout or "tp4" in layout else 2
    results = run_distributed(train, ranks, family, LAYOUTS[layout])
    for got in results:
        assert got["loss"] == pytest.approx(wanted["loss"], rel=1e-9)
        assert got["norm"] == pytest.approx(wanted["norm"], rel=1e-9)
    stages = [got for got in results if "weights" in got]
    for step, theirs in enumerate(wanted["gradients"]):
        ours = merged([stage["gradients"][step] for stage in stages])
        assert ours.keys() == theirs.keys()
        scale = max(float(gradient.abs().max()) for gradient in theirs.values())
        for name, gradient in theirs.items():
            # A tensor whose gradient cancels to almost nothing is held to the scale of the others.
            largest = max(float(gradient.abs().max()), 1e-3 * scale)
            assert float((ours[name] - gradient).abs().max()) <= 1e-9 * largest, name
    ours = merged([stage["weights"] for stage in stages])
    for name, weight in wanted["weights"].items():
        assert float((ours[name] - weight).abs().max()) <= 1e-9 * float(weight.abs().max()), name


def merged(stages: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of all pipeline stages; of a tied table the first stage's."""
    out = {name: tensor for stage in stages for name, tensor in stage.items()}
    if "token_table" in out and "output_table" in out and torch.equal(out["token_table"], out["output_table"]):
        del out["output_table"]
    return out


def kept(layout: dict[str, Any]) -> int:
    """Bytes that a forward pass keeps for the backward pass on this rank, parameters aside."""
    model = model_of(spec_of("gpt", dropout=0.1, seq_len=64, layers=4), grid(**layout), dtype=torch.float32)
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens, domain, targets = text(2, length=62)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens, domain, targets, DropoutKey(3, torch.arange(2)))
    parameters = {local_tensor(item).untyped_storage().data_ptr() for item in model.parameters()}
    loss.backward()
    return sum(size for storage, size in held.items() if storage not in parameters)


@pytest.mark.distributed
def test_a_cut_sequence_keeps_less() -> None:
    """Between sub-layers half: norms, and what the first projections read, which is gathered a second time."""
    without = run_distributed(kept, 2, {"tp": 2})[0]
    with_it = run_distributed(kept, 2, {"tp": 2, "sequence_parallel": True})[0]
    print(without, with_it)
