"""A model whose layers lie on several ranks, in the stages of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from elle_mp.axes import Axis
from elle_mp.models.flops import head_layers
from elle_mp.models.spec import ModelSpec
from elle_mp.models.transformer import Transformer
from elle_mp.ops.dropout import DropoutKey
from elle_mp.parallel.mesh import Grid
from elle_mp.parallel.pipeline import Part, balanced, parts_of
from elle_mp.parallel.sharding import PartedModule, local_tensor


class Pipeline(PartedModule):
    """This rank's parts of a model: one, or several under schedules that pass each rank more than once.

    It has the face of a :class:`Transformer`; parameters have the names that they have in the whole model.
    """

    parts: Sequence[Transformer]

    def __init__(self, parts: Sequence[Transformer], compute_dtype: torch.dtype) -> None:
        super().__init__(parts)
        self.compute_dtype = compute_dtype
        self.my_parts = dict(zip(parts[0].grid.my_stages, parts, strict=True))

    @property
    def spec(self) -> ModelSpec:
        """Of the whole model."""
        return next(iter(self.my_parts.values())).spec

    @property
    def grid(self) -> Grid:
        """This rank's place."""
        return next(iter(self.my_parts.values())).grid

    @property
    def sizes(self) -> Mapping[Axis, int]:
        """The size of every axis."""
        return self.spec.axes

    @property
    def norm_stats(self) -> Tensor | None:
        """Weights ``[D]`` of the norms' statistics; every part has its own copy."""
        return next(iter(self.my_parts.values())).norm_stats

    @property
    def has_last(self) -> bool:
        """Whether losses and logits come out on this rank."""
        return any(part.part.last for part in self.my_parts.values())

    def forward(
        self, tokens: Tensor, domain: Tensor, targets: Tensor | None = None, key: DropoutKey | None = None
    ) -> Tensor:
        """One micro-batch through all stages, without gradients; all pipeline ranks pass the same.

        Args:
            tokens, domain, targets, key: as of :meth:`Transformer.forward`.

        Returns:
            On the rank of the last stage what the model returns; elsewhere a zero, or logits of no ids ``[B, T, 0]``.
        """
        grid, stages, me = self.grid, self.grid.pipeline_stages, self.grid.rank("pp")
        x, result = tokens, None
        for stage in range(stages):
            owner, after = grid.rank_of_stage(stage), grid.rank_of_stage(min(stage + 1, stages - 1))
            if owner == me:
                x = self.my_parts[stage](x, domain, targets, key)
                if stage == stages - 1:
                    result = x
                elif after != me:
                    dist.send(x.contiguous(), group=grid.group("pp"), group_dst=after)
            elif after == me and stage < stages - 1:
                x = torch.empty(self.hidden_shape(*tokens.shape), dtype=self.compute_dtype, device=grid.device)
                dist.recv(x, group=grid.group("pp"), group_src=owner)
        if result is not None:
            return result
        wide = torch.promote_types(self.compute_dtype, torch.float32)
        shape = () if targets is not None else (*tokens.shape, 0)
        return torch.zeros(shape, dtype=wide if targets is not None else self.compute_dtype, device=grid.device)

    def hidden_shape(self, rows: int, text: int) -> tuple[int, int, int]:
        """Of what passes between stages on this rank, ``[B, S, D]``, for so many sequences of so much text."""
        return (rows, self.grid.local_length(text + self.spec.prompt_tokens), self.spec.embed)


LanguageModel: TypeAlias = Transformer | Pipeline
"""A model, whole on its tensor-parallel ranks or in stages."""


def stage_parts(spec: ModelSpec, grid: Grid) -> tuple[Part, ...]:
    """What each pipeline stage of a layout holds of a model, in order.

    A split that is given is that of the stage's own model; the one before it, about to grow, has fewer layers. Until
    something is measured, costs are estimated.
    """
    split = grid.parallel.split
    if isinstance(split, str) or sum(split) != spec.layers:
        ends = (0.0, head_layers(spec)) if grid.costs is None else grid.costs.in_layers()
        split = balanced(spec.layers, grid.pipeline_stages, *ends)
    return parts_of(split)


def stage_of(name: str, parts: Sequence[Part]) -> int:
    """The stage that holds a parameter, by its name in the whole model (a tied table's original: the first)."""
    words = name.split(".")
    if words[0] == "layers":
        return next(stage for stage, part in enumerate(parts) if int(words[1]) in part.layers)
    return len(parts) - 1 if words[0] in ("final_norm", "head", "output_table") else 0


def tied_ends(model: LanguageModel) -> tuple[bool, bool, int] | None:
    """Whether this rank holds the first stage, and the last, of a pipeline whose table is tied, and the pipeline rank
    at the other end; ``None`` where there is one table or this rank has no part in it."""
    grid, stages = model.grid, model.grid.pipeline_stages
    if stages == 1 or not model.spec.tied:
        return None
    first, last, me = grid.rank_of_stage(0), grid.rank_of_stage(stages - 1), grid.rank("pp")
    if me not in (first, last):
        return None
    return me == first, me == last, last if me == first else first


def swap(tensor: Tensor, other: int, grid: Grid) -> Tensor:
    """Gives ``tensor`` to a pipeline rank and takes its own of the same shape."""
    group, theirs = grid.group("pp"), torch.empty_like(tensor)
    work = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, tensor, group=group, group_peer=other),
            dist.P2POp(dist.irecv, theirs, group=group, group_peer=other),
        ]
    )
    for item in work:
        item.wait()
    return theirs


@torch.no_grad()
def add_tied_gradients(model: LanguageModel) -> None:
    """Both copies of a tied table get the sum of their gradients (this rank's shards), bitwise the same."""
    ends = tied_ends(model)
    if ends is None:
        return
    first, last, other = ends
    if first and last:
        one, two = (_gradient(model, name) for name in ("token_table", "output_table"))
        one.add_(two)
        two.copy_(one)
        return
    mine = _gradient(model, "token_table" if first else "output_table")
    mine.add_(swap(mine.contiguous(), other, model.grid))  # a + b == b + a


def _gradient(model: LanguageModel, name: str) -> Tensor:
    parameter = model.get_parameter(name)
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return local_tensor(parameter.grad)


@torch.no_grad()
def copy_tied(model: LanguageModel, states: Mapping[str, Sequence[Tensor]]) -> None:
    """The last stage's copy of a tied table takes over the first stage's values, and what belongs to them.

    Args:
        states: this rank's further tensors of each parameter, by name (Adam's state).
    """
    ends = tied_ends(model)
    if ends is None:
        return
    first, last, other = ends
    if first and last:
        for source, target in zip(_all(model, "token_table", states), _all(model, "output_table", states), strict=True):
            target.copy_(source)
        return
    for item in _all(model, "token_table" if first else "output_table", states):
        if first:
            dist.send(item.contiguous(), group=model.grid.group("pp"), group_dst=other)
        else:
            received = torch.empty_like(item, memory_format=torch.contiguous_format)
            dist.recv(received, group=model.grid.group("pp"), group_src=other)
            item.copy_(received)


def _all(model: LanguageModel, name: str, states: Mapping[str, Sequence[Tensor]]) -> list[Tensor]:
    return [local_tensor(model.get_parameter(name)).detach(), *states.get(name, ())]
