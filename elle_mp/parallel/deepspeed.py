"""DeepSpeed's ZeRO over the data-parallel ranks of a grid, together with our tensor parallelism."""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from elle_mp.errors import UserError
from elle_mp.parallel.mesh import Grid
from elle_mp.parallel.sharding import named_specs

BUCKET = 1 << 25
"""Entries that DeepSpeed reduces or gathers at a time, unless one parameter has more."""
LIVE_BUCKETS = 2
"""Buckets of gathered entries that stage 3 keeps for the next use."""


def load_deepspeed() -> ModuleType:
    """DeepSpeed, imported when it is first needed: that takes seconds.

    Raises:
        UserError: it is not installed, or does not work here.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it need not look for others, and warn of what it finds
    try:
        module = importlib.import_module("deepspeed")
    except ImportError as error:
        raise UserError(
            f"parallel.engine: deepspeed needs DeepSpeed, which cannot be imported here ({error}); "
            "pip install 'elle-mp[deepspeed]', or parallel.engine=fsdp"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it tells of every engine that is made
    warnings.filterwarnings("ignore", r".*(all_gather_into|reduce_scatter)_tensor` is deprecated", FutureWarning)
    # Collectives over shared memory are for inference, and compile for a minute when a process group is first used.
    module.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return module


def check_grid(grid: Grid) -> None:
    """Refuses layouts that DeepSpeed's engine cannot run.

    Raises:
        UserError: there is a pipeline, or some ranks idle.
    """
    if grid.pipeline_stages > 1:
        raise UserError(
            f"parallel.engine: deepspeed shards a whole model, and parallel.pp={grid.size('pp')} cuts it into stages; "
            "pp=1 or engine=fsdp would do"
        )
    if grid.everyone is not None:
        raise UserError(
            "parallel.engine: deepspeed needs all ranks of the job (parallel.idle_ranks); engine=fsdp lets some wait"
        )


def data_parallel_group(grid: Grid) -> dist.ProcessGroup:
    """The ranks that hold the same part of every parameter: ZeRO shards over replicas, too. Collective."""
    if grid.size("dp_replicate") == 1:
        return grid.group("shard")
    if grid.size("shard") == 1:
        return grid.group("dp_replicate")
    if grid.mesh is None:
        raise RuntimeError("this grid has no mesh")
    return grid.mesh["dp_replicate", "shard"]._flatten("zero").get_group()


@dataclass(frozen=True)
class ModelParallelUnit:
    """What DeepSpeed asks of a layout (its ``mpu``, Megatron's ``parallel_state``)."""

    grid: Grid
    data_group: dist.ProcessGroup

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """What ZeRO shards over."""
        return self.data_group

    def get_data_parallel_world_size(self) -> int:
        """Its size."""
        return dist.get_world_size(self.data_group)

    def get_data_parallel_rank(self) -> int:
        """This rank's place in it."""
        return dist.get_rank(self.data_group)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """The tensor-parallel ranks."""
        return self.grid.group("tp")

    def get_model_parallel_world_size(self) -> int:
        """Their number."""
        return self.grid.tp_size

    def get_model_parallel_rank(self) -> int:
        """This rank among them."""
        return self.grid.tp_rank

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank


def start_engine(
    model: nn.Module,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    grid: Grid,
    group: dist.ProcessGroup,
) -> Any:
    """DeepSpeed's engine over ``model``, in place: its gradients and its optimizer's step go through ZeRO from now on.

    The caller has no more to do than ``engine(...)`` and ``engine.backward(loss, scale_wrt_gas=False)`` for each
    micro-batch, and ``engine.step()``. Gradients are averaged over the data-parallel ranks in the masters' precision.
    Norm and clipping are left to ``optimizer``, which gets this rank's whole part at once.

    Args:
        model: plain parameters on the meta device, in the dtype that it computes in; they get memory here.
        optimizer: makes one over all parameters, in one group.
    """
    deepspeed = load_deepspeed()
    os.environ.setdefault("LOCAL_RANK", "0")  # of a job of one rank that torchrun did not start
    unit, config = ModelParallelUnit(grid, group), settings(model, grid)
    deepspeed.init_distributed(dist_init_required=False)
    for module in reversed(list(model.modules())):
        for name, parameter in list(module.named_parameters(recurse=False)):
            memory = torch.zeros_like(parameter, device=grid.device)
            module.register_parameter(name, nn.Parameter(memory))
        if config["zero_optimization"]["stage"] == 3:
            # A module at a time, children first: what was made is cut before more is made.
            deepspeed.zero.Init(module=module, data_parallel_group=group, config_dict_or_path=config, mpu=unit)
    for name, spec in named_specs(model):
        model.get_parameter(name).model_parallel = spec.tensor_parallel_dim is not None  # type: ignore[attr-defined]
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, mpu=unit, config=config, dist_init_required=False
    )
    return engine


def stop_engine(engine: Any, model: nn.Module) -> None:
    """Takes DeepSpeed's hooks off, and frees what it holds of the model: it keeps references beyond the engine's end
    (the stack of modules, and the cache of a method)."""
    engine.destroy()
    stack = importlib.import_module("deepspeed.runtime.zero.parameter_offload").FWD_MODULE_STACK
    stack[:] = [module for module in stack if module is not model]
    if _is_stage_3(engine):
        give_back_linear()
        zero = engine.optimizer
        buffers = [bucket.buffer for bucket in zero.ipg_buckets.values()]
        flat = [
            *zero.fp32_partitioned_groups_flat,
            *zero.fp16_partitioned_groups_flat,
            zero.grad_partitions_flat_buffer,
        ]
        for tensor in (*flat, *(tensor.grad for tensor in flat), *buffers):
            if tensor is None:
                continue
            if tensor.untyped_storage().resizable():
                tensor.untyped_storage().resize_(0)
            else:  # NumPy has seen it (a checkpoint was written from it): only what refers to it can be dropped
                tensor.data = tensor.data.new_empty(0)
        for parameter in model.parameters():
            parameter.data = parameter.data.new_empty(0)  # it may be gathered


def give_back_linear() -> None:
    """Takes DeepSpeed's ``torch.nn.functional.linear`` off again.

    Stage 3 puts it there for every model of the process and leaves it. Its graph has another order: a rank that has
    it and one that has not reduce gradients in different orders, of different parameters into one another.
    """
    module = importlib.import_module("deepspeed.runtime.zero.partition_parameters")
    linear = getattr(module.InsertPostInitMethodToModuleSubClasses, "linear_bk", None)
    if linear is not None:
        nn.functional.linear = linear


@dataclass(frozen=True)
class Run:
    """Where a parameter's part lies.

    Attributes:
        start: of the part, in the memory order of the parameter that this rank computes with.
        length: entries; 0 where this rank has none.
        offset: of the part in this rank's masters.
    """

    start: int
    length: int
    offset: int


def masters(engine: Any) -> torch.Tensor:
    """This rank's part of all parameters: one flat tensor, which ZeRO updates."""
    zero = engine.optimizer
    flat = zero.fp32_partitioned_groups_flat if _is_stage_3(engine) else zero.single_partition_of_fp32_groups
    if len(flat) != 1:
        raise RuntimeError(f"ZeRO made {len(flat)} groups of parameters instead of one")
    return flat[0]


def run_of(engine: Any, parameter: nn.Parameter) -> Run:
    """Where this rank's part of a parameter lies."""
    if _is_stage_3(engine):
        _, offset, length = engine.optimizer.grad_position[engine.optimizer.get_param_id(parameter)]
        start = length * engine.optimizer._get_param_partition_rank(parameter)
        return Run(start, max(0, min(length, parameter.ds_numel - start)), offset)  # type: ignore[attr-defined]
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return Run(0, 0, 0)
    found, held = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Run(found.start, found.numel, held.start)


def publish(engine: Any) -> None:
    """Makes the parameters that the model computes with those of the masters. Collective."""
    zero = engine.optimizer
    if _is_stage_3(engine):
        zero._reassign_or_swap_out_partitioned_parameters(0)
    else:
        zero.update_lp_params()


def _is_stage_3(engine: Any) -> bool:
    return int(engine.zero_optimization_stage()) == 3


def bucket_size(sizes: Sequence[int]) -> int:
    """Numbers that are reduced or gathered together, for parameters of the given sizes."""
    return min(sum(sizes), max(BUCKET, *sizes))


def settings(model: nn.Module, grid: Grid) -> Mapping[str, Any]:
    """DeepSpeed's configuration for a layout."""
    sizes = [parameter.numel() for parameter in model.parameters()]
    low = next(model.parameters()).dtype == torch.bfloat16
    bucket = bucket_size(sizes)
    stage = grid.parallel.zero_stage
    if low and stage == 1:
        # For bf16 DeepSpeed's stage 1 is another optimizer, whose parts are laid out in other ways.
        stage = 2
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": False,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket + bucket % 2,
        "stage3_prefetch_bucket_size": bucket,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": LIVE_BUCKETS * bucket,
        "sub_group_size": sum(sizes) + 1,
    }
    if grid.parallel.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": grid.device.type != "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": low, "check_grad_overflow": True},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
