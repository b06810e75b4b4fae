"""``parallel.cpu_adam``: DeepSpeed's kernel where the host has the state, or torch's and a line that says why.

Building it takes minutes, so these tests take it from a folder under the temporary one, if it is there:

    ELLE_MP_BUILD_CPU_ADAM=1 python -m pytest tests/train/test_cpu_adam.py

builds it. A stand-in computes what the kernel is documented to compute, and shows that we ask it for the right things.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from threading import Timer
from typing import Any
from zlib import crc32

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import elle_mp.train.cpu_adam as cpu_adam
from elle_mp.checkpoint.store import CheckpointStore
from elle_mp.config_file import parse_config
from elle_mp.config_layout import layout_problems
from elle_mp.parallel.deepspeed import load_deepspeed
from elle_mp.train.cpu_adam import CpuAdamW, check_cpu_adam, load_kernel
from elle_mp.train.deepspeed import sharded_twin
from tests.distributed.test_parity import deviations, reference
from tests.distributed.training import Setting, Trained, compare, fresh_grid
from tests.distributed_utils import run_distributed
from tests.train.test_deepspeed import FP32, SEED, Numbers, make_zero, tensors_of, train_zero, weights

HAVE = importlib.util.find_spec("deepspeed") is not None
pytestmark = pytest.mark.skipif(not HAVE, reason="deepspeed is not installed")

BUILD = "ELLE_MP_BUILD_CPU_ADAM"
VERSIONS = "-".join(version(name) for name in ("torch", "deepspeed")) if HAVE else ""
# The build names the headers' paths, so another environment's would be made anew.
CACHE = Path(tempfile.gettempdir()) / f"elle-mp-cpu-adam-{VERSIONS}-{crc32(sys.prefix.encode()):08x}"
BUILT = pytest.mark.skipif(
    not (CACHE / "cpu_adam" / "cpu_adam.so").exists() and BUILD not in os.environ, reason=f"not built; set {BUILD}"
)
KERNELS = pytest.mark.parametrize("kind", ["stand-in", pytest.param("real", marks=BUILT)])


class StandIn:
    """AdamW in fp32 (Loshchilov & Hutter, algorithm 2), with the kernel's interface."""

    def __init__(self) -> None:
        self.updates = 0

    def create_adam(self, *settings: Any) -> None:
        self.settings = settings

    def adam_update(self, place: int, step: int, *given: Any) -> None:
        *numbers, corrected, weight, gradient, first, second = given
        lr, beta1, beta2, eps, decay = numbers
        assert self.settings == (place, *numbers, True, False)
        assert corrected is True
        assert all(item.is_contiguous() and item.dtype == torch.float32 for item in given[-4:])
        self.updates += 1
        first.mul_(beta1).add_(gradient, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (second / (1 - beta2**step)).sqrt_().add_(eps)
        weight.mul_(1 - lr * decay).addcdiv_(first, root, value=-lr / (1 - beta1**step))


def kernel_of(kind: str, patch: pytest.MonkeyPatch) -> Any:
    """The kernel that this process gets when it asks for it."""
    if kind == "stand-in":
        kernel = StandIn()
        patch.setattr(cpu_adam, "load_kernel", lambda: (kernel, ""))
        return kernel
    patch.setenv("TORCH_EXTENSIONS_DIR", str(CACHE))
    CACHE.mkdir(exist_ok=True)
    kernel, reason = load_kernel()
    assert kernel is not None, reason
    return kernel


def parameters(seed: int) -> list[Tensor]:
    """Of sizes around those of vectors and of the kernel's spans; one is empty."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(0,), (1,), (7, 3), (33,), (64, 65), (128,)]
    return [torch.randn(size, generator=generator) for size in sizes]


def groups_of(items: list[Tensor]) -> list[dict[str, Any]]:
    first = {"params": items[:4], "lr": 1e-2, "eps": 1e-4, "weight_decay": 0.1}
    return [first, {"params": items[4:], "lr": 3e-2, "eps": 1e-8, "weight_decay": 0.0}]


def updated(optimizer: torch.optim.Optimizer, items: list[Tensor]) -> list[list[Tensor]]:
    """Weights and state after twenty steps; some parameters have begun before, some have a gradient now and then."""
    for index, item in enumerate(items):
        step = torch.tensor(float(5 * (index % 2)))
        optimizer.state[item] = {"step": step, "exp_avg": item * 0.01, "exp_avg_sq": item.square() * 0.01}
    for number in range(20):
        for index, (item, gradient) in enumerate(zip(items, parameters(10 + number), strict=True)):
            item.grad = None if index == 2 and number % 3 else gradient
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        optimizer.step()
    state = [optimizer.state[item] for item in items]
    return [items, *([entry[key] for entry in state] for key in ("exp_avg", "exp_avg_sq", "step"))]


def both(kind: str) -> list[tuple[list[Tensor], list[Tensor]]]:
    with pytest.MonkeyPatch.context() as patch:
        kernel = kernel_of(kind, patch)
        mine, other = parameters(1), parameters(1)
        ours = updated(CpuAdamW(kernel, groups_of(mine), (0.9, 0.98)), mine)
        wanted = updated(torch.optim.AdamW(groups_of(other), betas=(0.9, 0.98), fused=True), other)
    return list(zip(ours, wanted, strict=True))


@pytest.mark.distributed
@KERNELS
def test_it_updates_as_torch_does(kind: str) -> None:
    for ours, wanted in run_distributed(both, 1, kind)[0]:
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("item", [torch.zeros(3, dtype=torch.float64), torch.zeros(4, 4).t()[:2]])
def test_what_it_would_not_update_is_refused(item: Tensor) -> None:
    with pytest.raises(ValueError, match="parameter on cpu with strides"):
        CpuAdamW(StandIn(), [{"params": [item]}], (0.9, 0.98))


def layout_of(stage: int, cpu_adam: str) -> dict[str, Any]:
    offload = {"engine": "deepspeed", "zero_stage": stage, "dp_shard": 2, "offload": True}
    return offload | {"cpu_adam": cpu_adam}


Run = tuple[Numbers, Mapping[str, Tensor]]


def runs(kind: str, stage: int, folder: str) -> tuple[Run, Run, Run, str]:
    """Eight steps under torch's AdamW; the same under the kernel; and its last four after a checkpoint."""
    out = []
    with pytest.MonkeyPatch.context() as patch:
        kernel = kernel_of(kind, patch)
        store = CheckpointStore(Path(folder))
        for name, first in (("torch", 0), ("deepspeed", 0), ("deepspeed", 4)):
            optimizer = make_zero("llama", "none", fresh_grid(layout_of(stage, name)))
            optimizer.initialise(SEED + first)
            if first:
                store.load("four", tensors_of(optimizer))
                optimizer.loaded()
            numbers: Numbers = []
            if not first:
                numbers = train_zero(optimizer, "none", 0, 4)
                store.save("four", tensors_of(optimizer), {})
            numbers += train_zero(optimizer, "none", 4, 8)
            inner = type(optimizer.inner).__name__
            out.append((numbers, weights(sharded_twin(optimizer, FP32))))
            optimizer.release()
        if kind == "stand-in":
            assert kernel.updates > 0
    return out[0], out[1], out[2], inner


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "stage"), [("stand-in", 3), pytest.param("real", 2, marks=BUILT), pytest.param("real", 3, marks=BUILT)]
)
def test_a_model_trains_as_under_torch_and_goes_on_to_the_bit(kind: str, stage: int, tmp_path: Path) -> None:
    for torchs, ours, resumed, inner in run_distributed(runs, 2, kind, stage, str(tmp_path)):
        assert inner == "CpuAdamW"
        for got, wanted in zip(ours[0], torchs[0], strict=True):
            assert got == pytest.approx(wanted, rel=1e-6)
        for name, weight in torchs[1].items():
            torch.testing.assert_close(ours[1][name], weight, rtol=1e-5, atol=2e-6, msg=name)
        assert resumed[0] == ours[0][4:]
        assert all(torch.equal(resumed[1][name], weight) for name, weight in ours[1].items())


def grown(kind: str, setting: Setting, file: str) -> Trained:
    with pytest.MonkeyPatch.context() as patch:
        kernel_of(kind, patch)
        (told,) = compare([(setting, layout_of(2, "deepspeed"), file)])
    return told


@pytest.mark.distributed
@KERNELS
def test_it_trains_through_a_growth(kind: str) -> None:
    setting = Setting("gpt", "fp32", 2)
    wanted = reference(setting)
    found = deviations(wanted, run_distributed(grown, 2, kind, setting, wanted["file"]))
    assert {name: worst for name, worst in found.items() if not worst[0] < 1e-4} == {}


def one_cannot(folder: str) -> tuple[str, list[str]]:
    """What all ranks use, and what is said, when the last one has a compiler that does nothing."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 0:
            kernel_of("stand-in", patch)
        else:
            load_kernel.cache_clear()
            load_deepspeed()
            patch.setattr(importlib.import_module("deepspeed.ops.op_builder.builder").OpBuilder, "_loaded_ops", {})
            patch.setenv("CXX", "false")
            patch.setenv("TORCH_EXTENSIONS_DIR", folder)
        check_cpu_adam(config_of({"cpu_adam": "deepspeed"}), said.append)
        optimizer = make_zero("gpt", "none", fresh_grid(layout_of(2, "deepspeed")))
        inner = type(optimizer.inner).__name__
        optimizer.release()
        load_kernel.cache_clear()
    return inner, said


def config_of(parallel: dict[str, Any]) -> Any:
    tree = {"model": {"layers": 1, "heads": 1, "head_dim": 8, "seq_len": 8}, "precision": "fp32"}
    stream = [{"domain": "a", "data": "a", "steps": 1}]
    layout = {"engine": "deepspeed", "offload": True}
    return parse_config(tree | {"stream": stream, "parallel": layout | parallel})


@pytest.mark.distributed
def test_torchs_takes_its_place_on_all_ranks_where_one_cannot_build_it(tmp_path: Path) -> None:
    for inner, (before, after) in run_distributed(one_cannot, 2, str(tmp_path)):
        assert inner == "AdamW"
        assert "takes minutes" in before
        assert after.startswith("parallel.cpu_adam: it cannot be used (rank 1: ")
        assert after.endswith("; torch's fused AdamW takes its place")
        assert "\n" not in after


def test_a_build_that_goes_on_is_waited_for_and_one_that_was_killed_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "cpu_adam" / "lock"
    cpu_adam.wait_for_others(60.0)
    lock.touch()
    os.utime(lock, (time.time() - 61.0,) * 2)
    with pytest.raises(TimeoutError, match=f"has left {lock}; delete it"):
        cpu_adam.wait_for_others(60.0)
    lock.touch()
    began = time.monotonic()
    Timer(0.3, lock.unlink).start()
    cpu_adam.wait_for_others(60.0)
    assert time.monotonic() - began >= 0.3


def test_it_is_for_what_deepspeed_offloads() -> None:
    for parallel in ({"offload": False}, {"engine": "fsdp"}):
        (problem,) = layout_problems(config_of({"cpu_adam": "deepspeed"} | parallel), 1)
        assert "parallel.cpu_adam=deepspeed updates what parallel.offload=true leaves" in problem
    assert list(layout_problems(config_of({"cpu_adam": "deepspeed"}), 1)) == []
