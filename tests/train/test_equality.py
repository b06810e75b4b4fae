"""Replicas and both ends of a tied table: equal to the last bit after real steps, and one flipped bit is found."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from elle_mp.config import OptimConfig
from elle_mp.errors import UserError
from elle_mp.models.build import Precision
from elle_mp.parallel.agreement import check_same, disagreement
from elle_mp.parallel.sharding import local_tensor
from elle_mp.train.engine import make_optimizer
from elle_mp.train.equality import BLOCK, check_equal, checksum
from elle_mp.train.optimizer import ShardedAdamW
from elle_mp.train.trainer import Trainer, rows_of
from tests.distributed.training import ROWS, fresh_grid, global_batch
from tests.distributed_utils import run_distributed
from tests.tiny import spec_of

FINAL = "final_norm.weight"
WHERE: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "replicas": ({"dp_replicate": 2}, {"layers.1.mlp.out_weight": "parallel.dp_replicate", FINAL: "dp_replicate"}),
    "tensor parallel": ({"tp": 2, "sequence_parallel": True}, {FINAL: "parallel.tp", "position_table": "parallel.tp"}),
    "pipeline": ({"pp": 2}, {"output_table": "parallel.pp"}),
    "V": ({"pp": 2, "schedule": "zbv"}, {"output_table": "parallel.pp"}),
    "zero 2": ({"engine": "deepspeed"}, {"model " + FINAL: "data-parallel ranks"}),
    "zero 3, tensor parallel": ({"engine": "deepspeed", "zero_stage": 3, "tp": 2}, {FINAL: "parallel.tp"}),
}
"""Layouts, and parameters whose damage on one rank is seen, with what the message calls the axis."""


def flip(values: Tensor, entry: int) -> None:
    """Changes the lowest bit of one entry."""
    bits = local_tensor(values).detach().view(-1)[entry : entry + 1].view(torch.int32)
    bits.bitwise_xor_(1)


def tensors_of(optimizer: ShardedAdamW, name: str) -> list[Tensor]:
    """A parameter and its moments, what of them can be damaged on this rank."""
    if name.startswith("model "):
        return [optimizer.model.get_parameter(name.removeprefix("model "))]
    keys = [key for key in optimizer.shards if name in (key, key[0])]
    return [
        tensor
        for key in keys[:1]
        for tensor in (optimizer.shards[key], optimizer.moments[key].first, optimizer.moments[key].second)
    ]


def damaged(layout: dict[str, Any], names: list[str]) -> dict[str, list[str]]:
    """What is said of each parameter, and of its moments, after one rank's copy has lost a bit."""
    place = fresh_grid(layout)
    spec = spec_of("gpt", layers=4)
    optimizer = make_optimizer(spec, place, Precision(torch.float32, torch.float32), OptimConfig(lr=3e-3))
    optimizer.initialise(1)
    trainer = Trainer(optimizer.model, optimizer, 1, 3)
    for step in range(3):
        trainer.step(global_batch(step).rows(*rows_of(place, ROWS)), 1.0)
        check_equal(optimizer, step)
    said: dict[str, list[str]] = {}
    for name in names:
        # The V has both ends of the table on rank 0.
        struck = 0 if layout.get("schedule") == "zbv" else 1
        mine = tensors_of(optimizer, name) if dist.get_rank() == struck else []
        count: list[int] = [len(mine)]
        dist.broadcast_object_list(count, src=struck)
        for index in range(count[0]):
            for repair in (False, True):
                if mine:
                    flip(mine[index], mine[index].numel() - 1)
                if not repair:
                    with pytest.raises(UserError) as caught:
                        check_equal(optimizer, 7)
                    said.setdefault(name, []).append(str(caught.value))
    check_equal(optimizer, 8)
    return said


@pytest.mark.distributed
@pytest.mark.parametrize("name", WHERE)
def test_one_bit_is_found_and_named(name: str) -> None:
    layout, names = WHERE[name]
    if "engine" in layout and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    for said in run_distributed(damaged, 2, layout, list(names)):
        assert list(said) == list(names)
        for parameter, axis in names.items():
            shown = parameter.removeprefix("model ").replace("output_table", "token_table")
            kinds = ("", "first moment of ", "second moment of ")[: len(said[parameter])]
            assert len(kinds) == (1 if parameter.startswith("model ") else 3)
            for kind, text in zip(kinds, said[parameter], strict=True):
                assert text.startswith(f"after step 7 {kind}{shown}")
                assert axis in text.split(":")[0]
                assert ("copies on rank 0 differ" if name == "V" else "rank 1 differs from rank 0") in text


def test_the_checksum_sees_every_bit_of_every_entry() -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        values = torch.randn(BLOCK + 3, dtype=torch.float64).to(dtype)
        bits = values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])
        before = int(checksum(values))
        for entry in (0, 1, BLOCK - 1, BLOCK, BLOCK + 2):
            for bit in (0, 7, 8 * values.element_size() - 1):
                kept = bits[entry].clone()
                bits[entry] ^= 1 << bit if bit < 8 * values.element_size() - 1 else torch.iinfo(bits.dtype).min
                assert int(checksum(values)) != before
                bits[entry] = kept
        for other in (1, BLOCK):
            swapped = values.clone()
            swapped[[0, other]] = swapped[[other, 0]]
            assert int(checksum(swapped)) != before
        assert int(checksum(values)) == before
    assert int(checksum(torch.empty(0))) == 0


def test_the_ranks_that_disagree_with_most_are_named() -> None:
    assert disagreement([1, 1, 2, 1], range(4)) == "rank 2 differs from ranks 0, 1 and 3"
    assert disagreement([5, 1, 1], [4, 6, 8]) == "rank 4 differs from ranks 6 and 8"
    assert disagreement([5, 1], [4, 6]) == "rank 6 differs from rank 4"
    assert disagreement([1, 2, 3], range(3)) == "ranks 1 and 2 differ from rank 0"
    assert disagreement([*range(1), *[7] * 20], range(21)) == "rank 0 differs from 20 other ranks"


def own_text() -> str:
    """What is said when rank 1 has another text."""
    check_same("the text", "same")
    with pytest.raises(UserError) as caught:
        check_same("the text", str(dist.get_rank() == 1))
    return str(caught.value)


@pytest.mark.distributed
def test_ranks_that_start_from_different_texts_are_named() -> None:
    for said in run_distributed(own_text, 3):
        assert said.startswith("the text is not the same on all ranks: rank 1 differs from ranks 0 and 2;")
