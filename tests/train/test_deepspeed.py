"""DeepSpeed's ZeRO against FSDP2's one rank: losses, norms, weights, checkpoints (growth: test_parity.py)."""

from __future__ import annotations

import gc
import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from elle_mp.checkpoint.shards import Blocks
from elle_mp.checkpoint.store import CheckpointStore
from elle_mp.config import OptimConfig
from elle_mp.errors import UserError
from elle_mp.growth.factors import After, Factors
from elle_mp.models.build import Precision, empty_model
from elle_mp.models.transformer import IGNORED, Transformer
from elle_mp.parallel.deepspeed import load_deepspeed
from elle_mp.parallel.mesh import Grid
from elle_mp.parallel.sharding import initialise, named_specs
from elle_mp.train.deepspeed import ZeroAdamW, hollow_model, sharded_twin
from elle_mp.train.optimizer import ShardedAdamW
from tests.distributed.training import fresh_grid
from tests.distributed_utils import run_distributed
from tests.tiny import grid, moments, spec_of, text, weights

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")

FP32 = Precision(torch.float32, torch.float32)
BF16 = Precision(torch.float32, torch.bfloat16)
# Clipped in about every other step; the epsilon keeps Adam from making much of rounding.
OPTIM = OptimConfig(lr=1e-2, betas=(0.9, 0.98), eps=1e-3, weight_decay=0.1, clip=1.0)
ROWS, MICRO, SEED = 8, 2, 3

Numbers = list[tuple[float, float]]
Result = tuple[Numbers, dict[str, Tensor]]


def factors_of(model: Transformer, kind: str) -> dict[str, Factors]:
    """``entries``: every parameter has rates, epsilons and ages by entry, some are new; ``none``."""
    out: dict[str, Factors] = {}
    if kind == "none":
        return out
    generator = torch.Generator().manual_seed(5)
    for number, (name, spec) in enumerate(named_specs(model)):
        shape = spec.shape(model.sizes)
        rate = tuple(0.5 + torch.rand(size, generator=generator, dtype=torch.float64) for size in shape)
        eps = (None,) * (len(shape) - 1) + (0.5 + torch.rand(shape[-1], generator=generator, dtype=torch.float64),)
        old = tuple(torch.rand(size, generator=generator) < 0.6 for size in shape)
        if number % 3:
            out[name] = Factors(rate, eps, old, new=number % 5 == 0)
    return out


def after_of(kind: str, step: int) -> After:
    """Old entries rest at first, then new ones learn faster."""
    return After() if kind == "none" else After(freeze_old=step < 3, new_factor=1.3)


def batch_of(step: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Tokens, domains, targets; of the first rows few are predicted, so ranks and micro-batches weigh unevenly."""
    tokens, domain, targets = text(ROWS, seed=step)
    targets[: ROWS // 2, 2:] = IGNORED
    return tokens, domain, targets, int((targets != IGNORED).sum())


def make_reference(family: str, kind: str, precision: Precision = FP32, **changes: Any) -> tuple[Any, ShardedAdamW]:
    """FSDP2 and AdamW on all ranks there are."""
    model = empty_model(spec_of(family, **changes), grid(), precision)
    initialise(model, SEED)
    return model, ShardedAdamW(model, OPTIM, factors_of(model, kind))


def train_reference(model: Any, optimizer: ShardedAdamW, kind: str, first: int, last: int) -> Numbers:
    out = []
    for step in range(first, last):
        tokens, domain, targets, count = batch_of(step)
        loss = model(tokens, domain, targets)
        (loss / count).backward()
        out.append((float(loss.detach()) / count, optimizer.step(1.0, after_of(kind, step))))
    return out


def make_zero(family: str, kind: str, place: Grid, precision: Precision = FP32, **changes: Any) -> ZeroAdamW:
    model = hollow_model(spec_of(family, **changes), place, precision)
    return ZeroAdamW(model, OPTIM, factors_of(model, kind))


def train_zero(optimizer: ZeroAdamW, kind: str, first: int, last: int) -> Numbers:
    place, model, out = optimizer.grid, optimizer.model, []
    share = ROWS // place.dp_size
    for step in range(first, last):
        tokens, domain, targets, count = batch_of(step)
        total = torch.zeros((), dtype=torch.float64)
        for row in range(place.dp_rank * share, (place.dp_rank + 1) * share, MICRO):
            rows = slice(row, row + MICRO)
            loss = optimizer.forward(tokens[rows], domain[rows], targets[rows])
            optimizer.backward(loss * (place.dp_size * place.size("cp") / count))
            total += loss.detach()
        place.sum(total, "dp_replicate", "shard")
        out.append((float(total) / count, optimizer.step(1.0, after_of(kind, step))))
        if step == first + 1:  # an evaluation in between leaves the training alone
            with torch.no_grad():
                model.eval()(tokens, domain, targets)
            model.train()
    return out


def tensors_of(optimizer: ShardedAdamW) -> dict[str, Tensor | Blocks]:
    """As the runner names them in a checkpoint."""
    model: dict[str, Tensor | Blocks] = {f"model.{name}": item for name, item in optimizer.parameters.items()}
    return model | {f"optim.{name}": item for name, item in optimizer.tensors().items()}


def zero_run(family: str, kind: str, parallel: Mapping[str, Any], precision: Precision = FP32) -> Result:
    optimizer = make_zero(family, kind, fresh_grid({"engine": "deepspeed", **parallel}), precision)
    optimizer.initialise(SEED)
    numbers = train_zero(optimizer, kind, 0, 10)
    result = numbers, weights(sharded_twin(optimizer, FP32))
    optimizer.release()  # DeepSpeed would keep it, its process groups and their threads
    return result


def assert_close(numbers: Numbers, expected: Numbers, tolerance: float) -> None:
    for step, (got, want) in enumerate(zip(numbers, expected, strict=True)):
        assert got == pytest.approx(want, rel=tolerance), f"loss and norm of step {step}"


def assert_same_weights(got: Mapping[str, Tensor], want: Mapping[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert float((got[name] - value).abs().max()) <= tolerance * max(1.0, float(value.abs().max())), name


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world_size", "family", "kind", "parallel"),
    [
        (2, "gpt", "entries", {"zero_stage": 2}),
        (2, "llama", "none", {"zero_stage": 2, "dp_shard": 2, "offload": True}),
        (2, "bert", "entries", {"zero_stage": 3, "dp_shard": 2}),
        (2, "llama", "none", {"zero_stage": 3, "dp_shard": 2, "offload": True}),
        (2, "gpt", "none", {"zero_stage": 1, "tp": 2, "sequence_parallel": True}),
        (2, "llama", "none", {"zero_stage": 3, "cp": 2}),
        (2, "gpt", "none", {"zero_stage": 3, "recompute": "full"}),
        (2, "bert", "none", {"zero_stage": 2, "recompute": "selective"}),
        (4, "llama", "entries", {"zero_stage": 1, "tp": 2, "dp_shard": 2}),
        (4, "gpt", "none", {"zero_stage": 2, "dp_shard": 2, "dp_replicate": 2}),
    ],
)
def test_ten_steps_equal_one_rank_of_fsdp(world_size: int, family: str, kind: str, parallel: dict[str, Any]) -> None:
    results = run_distributed(zero_run, world_size, family, kind, parallel)
    model, optimizer = make_reference(family, kind)
    expected = train_reference(model, optimizer, kind, 0, 10)
    assert any(norm > OPTIM.clip for _, norm in expected)
    for numbers, values in results:
        assert_close(numbers, expected, 2e-5)
        assert_same_weights(values, weights(model), 2e-5)


def save_zero(folder: str, family: str, kind: str, parallel: Mapping[str, Any]) -> tuple[Numbers, Numbers]:
    """The steps before a checkpoint, and those after it, without an interruption."""
    optimizer = make_zero(family, kind, fresh_grid({"engine": "deepspeed", **parallel}))
    optimizer.initialise(SEED)
    before = train_zero(optimizer, kind, 0, 4)
    CheckpointStore(Path(folder)).save("four", tensors_of(optimizer), {})
    return before, train_zero(optimizer, kind, 4, 8)


def load_zero(folder: str, family: str, kind: str, parallel: Mapping[str, Any]) -> tuple[Numbers, dict[str, Tensor]]:
    """What was loaded, and the steps after it."""
    optimizer = make_zero(family, kind, fresh_grid({"engine": "deepspeed", **parallel}))
    optimizer.initialise(SEED + 1)
    CheckpointStore(Path(folder)).load("four", tensors_of(optimizer))
    optimizer.loaded()
    twin = sharded_twin(optimizer, FP32)
    state = ShardedAdamW(twin, OPTIM)
    optimizer.give_to(twin, state.moments)
    return train_zero(optimizer, kind, 4, 8), moments(state)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"zero_stage": 1, "dp_shard": 2}, {"zero_stage": 3, "tp": 2}),
        ({"zero_stage": 3, "dp_shard": 2}, {"zero_stage": 2, "dp_shard": 2, "offload": True}),
        ({"zero_stage": 2, "tp": 2}, {"zero_stage": 1, "dp_replicate": 2}),
    ],
)
def test_a_checkpoint_goes_on_under_another_layout_and_engine(
    first: dict[str, Any], second: dict[str, Any], tmp_path: Path
) -> None:
    """ZeRO to ZeRO, ZeRO to FSDP2, and FSDP2 to ZeRO; steps and factors by entry included."""
    family, kind = "llama", "entries"
    before, after = run_distributed(save_zero, 2, str(tmp_path / "zero"), family, kind, first)[0]
    model, optimizer = make_reference(family, kind)
    assert_close(before, train_reference(model, optimizer, kind, 0, 4), 2e-5)
    CheckpointStore(tmp_path / "fsdp").save("four", tensors_of(optimizer), {})
    expected = moments(optimizer)
    for folder in ("zero", "fsdp"):
        for numbers, found in run_distributed(load_zero, 2, str(tmp_path / folder), family, kind, second):
            assert_close(numbers, after, 2e-5)
            assert_same_weights(found, expected, 2e-5)
    CheckpointStore(tmp_path / "zero").load("four", tensors_of(optimizer))
    assert_same_weights(moments(optimizer), expected, 2e-5)
    assert_close(train_reference(model, optimizer, kind, 4, 8), after, 2e-5)


def held_bytes() -> int:
    """Of all tensors that Python knows of."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), Tensor) and item.device.type == "cpu"]
    storages = [item.untyped_storage() for item in tensors]
    return sum({item._cdata: item.nbytes() for item in storages}.values())


def make_and_release(stage: int, offload: bool) -> tuple[int, int]:
    """Bytes that the third engine leaves behind, and those of its masters (the first loads parts of torch)."""
    place, left = fresh_grid({"engine": "deepspeed", "zero_stage": stage, "dp_shard": 2, "offload": offload}), []
    linear = torch.nn.functional.linear
    for _ in range(3):
        optimizer = make_zero("llama", "none", place)
        optimizer.initialise(SEED)
        train_zero(optimizer, "none", 0, 2)
        masters = optimizer.flat.nbytes
        optimizer.release()
        assert torch.nn.functional.linear is linear  # stage 3 has one of its own, for all models of the process
        del optimizer
        left.append(held_bytes())
    return left[2] - left[1], masters


@pytest.mark.distributed
@pytest.mark.parametrize(("stage", "offload"), [(1, False), (2, True), (3, False), (3, True)])
def test_a_released_engine_leaves_its_memory(stage: int, offload: bool) -> None:
    for left, masters in run_distributed(make_and_release, 2, stage, offload):
        assert left < masters / 10


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_computes_on_fp32_masters(stage: int) -> None:
    parallel = {"zero_stage": stage, "dp_shard": 2}
    (numbers, values), _ = run_distributed(zero_run, 2, "gpt", "none", parallel, BF16)
    model, optimizer = make_reference("gpt", "none", BF16)
    expected = train_reference(model, optimizer, "none", 0, 10)
    exact, plain = make_reference("gpt", "none")
    spread = [abs(a - b) for (a, _), (b, _) in zip(expected, train_reference(exact, plain, "none", 0, 10), strict=True)]
    for (got, _), (want, _) in zip(numbers, expected, strict=True):
        assert abs(got - want) <= 2 * max(spread)
    assert any(not torch.equal(value, value.bfloat16().float()) for value in values.values())
    assert_same_weights(values, weights(model), 1e-2)


def everything_of(optimizer: ZeroAdamW) -> list[Tensor]:
    """This rank's part of masters and state."""
    out: list[Tensor] = []
    for item in tensors_of(optimizer).values():
        out += item.blocks.values() if isinstance(item, Blocks) else [item]
    return out


def spoiled(stage: int) -> tuple[float, bool]:
    """The norm of a step with a gradient that is no number on the last rank, and whether it changed anything."""
    optimizer = make_zero("gpt", "none", fresh_grid({"engine": "deepspeed", "zero_stage": stage, "dp_shard": 2}))
    optimizer.initialise(SEED)
    train_zero(optimizer, "none", 0, 1)
    before = [values.clone() for values in everything_of(optimizer)]
    tokens, domain, targets, _ = batch_of(1)
    loss = optimizer.forward(tokens, domain, targets)
    optimizer.backward(loss * (float("nan") if optimizer.grid.dp_rank == 1 else 1.0))
    norm = optimizer.step(1.0)
    same = all(torch.equal(*pair) for pair in zip(before, everything_of(optimizer), strict=True))
    return norm, same


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_gradient_that_is_not_finite_changes_nothing(stage: int) -> None:
    for norm, same in run_distributed(spoiled, 2, stage):
        assert not norm < float("inf")
        assert same


def refusals() -> list[str]:
    out = []
    fp64 = Precision(torch.float64, torch.float64)
    for precision, parallel in ((fp64, {}), (FP32, {"pp": 2})):
        place = fresh_grid({"engine": "deepspeed", **parallel})
        try:
            ZeroAdamW(hollow_model(spec_of("gpt"), place, precision), OPTIM)
        except UserError as error:
            out.append(str(error))
    return out


@pytest.mark.distributed
def test_what_deepspeed_cannot_do_is_one_line() -> None:
    precision, pipeline = run_distributed(refusals, 2)[0]
    assert "precision: fp64" in precision and "\n" not in precision
    assert "parallel.pp=2" in pipeline and "\n" not in pipeline


def test_without_deepspeed_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UserError, match=r"No module named 'deepspeed'.*pip install 'elle-mp\[deepspeed\]'") as caught:
        load_deepspeed()
    assert "\n" not in str(caught.value)
