"""What the planner says, against what torch really allocates and sends."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import schedules
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from elle_mp.config import OptimConfig, ParallelConfig
from elle_mp.data.batches import Batch
from elle_mp.models.build import Precision, empty_model
from elle_mp.models.spec import ModelSpec
from elle_mp.models.transformer import Transformer
from elle_mp.observe.planning.activations import stage_bytes
from elle_mp.observe.planning.memory import rank_memory
from elle_mp.observe.planning.schedules import most_kept
from elle_mp.observe.planning.setting import Setting, make_setting
from elle_mp.observe.planning.traffic import rank_traffic
from elle_mp.ops.dropout import DropoutKey
from elle_mp.ops.linear_cross_entropy import loss_and_gradients
from elle_mp.parallel.data_parallel import synchronise_gradients
from elle_mp.parallel.sharding import initialise, local_tensor
from elle_mp.train.engine import make_optimizer
from elle_mp.train.trainer import Trainer
from tests.distributed_utils import run_distributed
from tests.tiny import FAMILIES, grid, optimizer_of, spec_of

SIZES: dict[str, Any] = {"layers": 3, "heads": 8, "head_dim": 16, "mlp": 384, "seq_len": 66, "vocab_multiple": 64}
ROWS = 4


class Storages(TorchDispatchMode):
    """Remembers every storage that an op makes, without keeping it."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, list | tuple) else (out,):
            if isinstance(item, Tensor) and item.device.type != "meta":
                storage = item.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def alive(self, besides: set[int]) -> int:
        """Bytes of those that still exist."""
        gc.collect()
        return sum(size for key, (ref, size) in self.made.items() if not ref.expired() and key not in besides)


def sized(family: str, **changes: Any) -> ModelSpec:
    return spec_of(family, **SIZES | changes)


def batch_of(spec: ModelSpec, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    tokens = torch.randint(3, 300, (rows, spec.text_length))
    return tokens, torch.zeros(rows, dtype=torch.int64), torch.randint(0, 300, (rows, spec.text_length))


def model_of(spec: ModelSpec, precision: str, **parallel: Any) -> Transformer:
    place = grid(**parallel)
    model = empty_model(spec, place, Precision.named(precision), place.parallel.reshard_after_forward)
    initialise(model, 1)
    return model


def kept(model: Transformer, key: DropoutKey | None = None) -> int:
    """Bytes that live after a forward pass and not before it, the weights' copies aside."""
    batch = batch_of(model.spec)
    with torch.no_grad():
        model(*batch)  # FSDP2's own lazy buffers
    own = {local_tensor(item).untyped_storage()._cdata for item in model.parameters()}
    with Storages() as storages:
        loss = model(*batch, key)
    own |= {local_tensor(item).untyped_storage()._cdata for item in model.parameters()}
    total = storages.alive(own | {loss.untyped_storage()._cdata})
    assert loss.requires_grad
    return total


def setting_of(spec: ModelSpec, precision: str, **parallel: Any) -> Setting:
    layout = ParallelConfig.model_validate(parallel)
    return make_setting(spec, layout, replicas=1, batch=ROWS, micro=ROWS, precision=precision, device="cpu")


CASES = [(family, precision, 0.0, "none") for family in FAMILIES for precision in ("bf16", "fp32", "fp64")]
CASES += [(family, "bf16", 0.1, "none") for family in FAMILIES]
CASES += [(family, "fp32", 0.1, level) for family in FAMILIES for level in ("selective", "full")]


@pytest.mark.parametrize(("family", "precision", "dropout", "recompute"), CASES)
def test_activations_are_what_a_forward_pass_keeps(family: str, precision: str, dropout: float, recompute: str) -> None:
    spec = sized(family, dropout=dropout)
    model = model_of(spec, precision, recompute=recompute)
    key = DropoutKey(1, torch.arange(ROWS)) if dropout else None
    measured, said = kept(model, key), stage_bytes(setting_of(spec, precision, recompute=recompute), 0)
    assert said == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("family", ["bert", "gpt"])
def test_what_growth_leaves_keeps_more(family: str) -> None:
    """Gates and weighted norms, as growths leave them."""
    spec = replace(sized(family), gated=(1, 2), weighted_norms=family == "bert")
    plain = stage_bytes(setting_of(sized(family), "fp32"), 0)
    measured, said = kept(model_of(spec, "fp32")), stage_bytes(setting_of(spec, "fp32"), 0)
    assert said == pytest.approx(measured, rel=0.01)
    assert said > 1.03 * plain


def state_of(family: str, precision: str, layout: dict[str, int]) -> Any:
    """Bytes of this rank's masters, optimizer and sharded gradients, allocated and said."""
    spec = sized(family, mlp=390)  # rows that four shards do not divide
    model = model_of(spec, precision, **layout)
    optimizer = optimizer_of(model)
    masters = sum(local_tensor(item).numel() * local_tensor(item).element_size() for item in model.parameters())
    state = sum(local_tensor(item).numel() * local_tensor(item).element_size() for item in optimizer.tensors().values())
    model(*batch_of(spec)).backward()
    grads = [local_tensor(item.grad) for item in model.parameters() if item.grad is not None]
    gradients = sum(item.numel() * item.element_size() for item in grads)
    parallel = model.grid.parallel
    ranks = parallel.dp_shard
    said = rank_memory(
        make_setting(spec, parallel, replicas=1, batch=ROWS * ranks, micro=ROWS, precision=precision, device="cpu"), 0
    )
    return (masters, state, gradients), (said.masters, said.optimizer, said.gradients)


@pytest.mark.distributed
@pytest.mark.parametrize(("family", "precision"), [("gpt", "bf16"), ("bert", "fp64"), ("llama", "fp32")])
def test_parameters_and_optimizer_are_exact(family: str, precision: str) -> None:
    for layout in ({}, {"tp": 2}, {"dp_shard": 2}):
        ranks = run_distributed(state_of, 2 if layout else 1, family, precision, layout)
        # Adam's step counts are whole on every rank; the heaviest shard is the first.
        assert ranks[0][0] == ranks[0][1], layout


def torch_order(name: str, ranks: int, rank: int, count: int) -> Iterator[tuple[int, int]]:
    """The order of torch's own schedule: (stage of the rank, +1 forward or -1 freed)."""
    parts = {"interleaved_1f1b": 3, "zero_bubble": 3, "zbv": 2}[name]
    kind = {
        "interleaved_1f1b": schedules.ScheduleInterleaved1F1B,
        "zero_bubble": schedules.ScheduleInterleavedZeroBubble,
        "zbv": schedules.ScheduleZBVZeroBubble,
    }[name]
    rounds = max(1, count // ranks)
    stub = SimpleNamespace(
        pp_group_size=ranks,
        n_local_stages=parts,
        num_stages=parts * ranks,
        _n_microbatches=count,
        number_of_rounds=rounds,
        microbatches_per_round=count // rounds,
    )
    frees = ("B",) if name == "interleaved_1f1b" else ("W",)
    for action in kind._calculate_single_rank_operations(stub, rank):  # type: ignore[arg-type]
        if action is not None and action.computation_type.value in ("F", *frees):
            yield action.stage_index // ranks, 1 if action.computation_type.value == "F" else -1


@pytest.mark.parametrize("name", ["interleaved_1f1b", "zero_bubble", "zbv"])
def test_as_many_micro_batches_wait_as_in_torch(name: str) -> None:
    for ranks in (2, 3, 4):
        for count in (ranks, 2 * ranks, 5 * ranks):
            layout = {"pp": ranks, "schedule": name, "virtual_stages": 3}
            setting = replace(setting_of(sized("gpt", layers=12), "fp32", **layout), micro_batches=count)
            for rank in range(ranks):
                sizes = [1000 + stage for stage in range(setting.parallel.stages_per_rank)]
                now, most = [0] * len(sizes), 0
                for stage, change in torch_order(name, ranks, rank, count):
                    now[stage] += change
                    most = max(most, sum(n * size for n, size in zip(now, sizes, strict=True)))
                assert most_kept(setting, rank, sizes)[0] == most, (ranks, count, rank)


def test_plain_schedules_wait_as_they_should() -> None:
    for name, waiting in (("gpipe", [8, 8, 8, 8]), ("1f1b", [4, 3, 2, 1])):
        setting = replace(setting_of(sized("gpt", layers=4), "fp32", pp=4, schedule=name), micro_batches=8)
        assert [most_kept(setting, rank, [1])[0] for rank in range(4)] == waiting


class Sent(TorchDispatchMode):
    """Adds up what collectives send, by the kind of their group, as the best algorithms send it."""

    def __init__(self, kinds: dict[str, str]) -> None:
        super().__init__()
        self.kinds = kinds
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func.__name__.split(".")[0], args)
        if func is torch.ops.elle_mp.linear_cross_entropy.default:
            with self:  # what an op does inside is seen by no mode
                return loss_and_gradients(*args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        box = next(
            item for item in args if isinstance(item, torch.ScriptObject) and item._type().name() == "ProcessGroup"
        )
        group = dist.ProcessGroup.unbox(box)
        ranks = group.size()
        if ranks == 1:
            return
        first = args[0][0] if isinstance(args[0], list | tuple) else args[0]
        whole, times = {
            "allreduce_": (first, 2),
            "_allgather_base_": (args[0], 1),
            "_reduce_scatter_base_": (args[1], 1),
            "alltoall_base_": (args[1], 1),
        }[name]
        kind = self.kinds.get(group.group_name, "other")
        sent = times * whole.numel() * whole.element_size() * (ranks - 1) // ranks
        self.bytes[kind] = self.bytes.get(kind, 0) + sent


def step_traffic(family: str, precision: str, parallel: dict[str, Any], changes: dict[str, Any]) -> Any:
    """Bytes that this rank sends in the forward and backward passes of two micro-batches, measured and said."""
    spec = sized(family, **changes)
    model = model_of(spec, precision, **parallel)
    layout = model.grid.parallel
    batch = [batch_of(spec, 2) for _ in range(2)]
    kinds = {model.grid.group(axis).group_name: axis for axis in ("tp", "shard", "dp_replicate")}
    key = DropoutKey(1, torch.arange(2)) if spec.dropout else None
    model(*batch[0], key).backward()  # what FSDP2 does once
    with Sent(kinds) as sent:
        for index, rows in enumerate(batch):
            synchronise_gradients(model, index == 1)
            model(*rows, key).backward()
    replicas = model.grid.size("dp_replicate")
    setting = make_setting(
        spec,
        layout,
        replicas=replicas,
        batch=4 * replicas * layout.dp_shard,
        micro=2,
        precision=precision,
        device="cpu",
    )
    said = rank_traffic(setting, 0)
    return sent.bytes, said


TRAFFIC: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    *((family, "fp32", {"tp": 2}, {}) for family in FAMILIES),
    ("gpt", "bf16", {"tp": 2}, {}),
    *((family, "fp32", {"tp": 2, "recompute": "full"}, {}) for family in FAMILIES),
    *((family, "fp32", {"tp": 2, "recompute": "selective"}, {}) for family in ("bert", "gpt")),
    ("gpt", "fp32", {"tp": 2, "recompute": "full"}, {"dropout": 0.1}),
]


@pytest.mark.distributed
@pytest.mark.parametrize(("family", "precision", "parallel", "changes"), TRAFFIC)
def test_tensor_parallel_traffic_is_exact(
    family: str, precision: str, parallel: dict[str, Any], changes: dict[str, Any]
) -> None:
    for measured, said in run_distributed(step_traffic, 2, family, precision, parallel, changes):
        assert measured == {"tp": said.tp}


@pytest.mark.distributed
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("reshard", [True, False])
def test_sharded_traffic_is_exact(precision: str, reshard: bool) -> None:
    layout = {"dp_shard": 2, "reshard_after_forward": reshard}
    for measured, said in run_distributed(step_traffic, 2, "llama", precision, layout, {}):
        assert measured == {"shard": said.dp_gather + said.dp_reduce}


@pytest.mark.distributed
def test_replicas_send_their_gradients_once() -> None:
    for measured, said in run_distributed(step_traffic, 2, "gpt", "bf16", {"dp_replicate": 2}, {}):
        assert measured == {"dp_replicate": said.dp_replicas}
        assert said.total == said.dp_replicas


def zero_traffic(stage: int, precision: str) -> Any:
    """Bytes that this rank sends in a step of two micro-batches under DeepSpeed, measured and said."""
    spec = sized("gpt")
    place = grid(dp_shard=2, engine="deepspeed", zero_stage=stage)
    optimizer = make_optimizer(spec, place, Precision.named(precision), OptimConfig())
    optimizer.initialise(1)
    trainer = Trainer(optimizer.model.train(), optimizer, 2, 1)
    rows = [torch.randint(3, 300, (ROWS, spec.text_length)) for _ in range(2)]
    batch = Batch(*rows, torch.zeros(ROWS, dtype=torch.int64), torch.arange(ROWS))
    trainer.step(batch, 1.0)  # stage 3 learns the order of its parameters
    with Sent({}) as sent:
        trainer.step(batch, 1.0)
    layout = place.parallel
    setting = make_setting(spec, layout, replicas=1, batch=2 * ROWS, micro=2, precision=precision, device="cpu")
    optimizer.release()
    return sum(sent.bytes.values()), rank_traffic(setting, 0).total


@pytest.mark.distributed
@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (2, "bf16"), (3, "bf16")])
def test_zero_s_traffic_is_what_is_said(stage: int, precision: str) -> None:
    """But for paddings, and single numbers that ranks agree on."""
    for measured, said in run_distributed(zero_traffic, 2, stage, precision):
        assert said == pytest.approx(measured, rel=0.01)
