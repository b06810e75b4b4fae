"""What layers and ends take by the clock, and the splits that come of it."""

from __future__ import annotations

import time
from dataclasses import astuple, replace
from typing import Any

import pytest
import torch

import elle_mp.models.costs as costs_module
from elle_mp.data.batches import Batch
from elle_mp.models.build import Precision
from elle_mp.models.costs import measure_costs
from elle_mp.models.pipeline import stage_parts
from elle_mp.models.spec import ModelSpec
from tests.distributed_utils import run_distributed
from tests.tiny import VOCAB, config_of, grid, text

LAYERS = 11
POSITIONS = 130


def splits(layout: dict[str, Any], *vocabularies: int) -> list[tuple[tuple[float, ...], list[int]]]:
    """Costs of models of eleven layers and so many ids, on real ranks, and the layers of each stage."""
    place = grid(**layout)
    tokens, domain, targets = text(2, length=POSITIONS - 2)
    batch, found = Batch(tokens, targets, domain, torch.arange(2)), []
    for ids in vocabularies:
        spec = ModelSpec.from_config(config_of("gpt", layers=LAYERS, seq_len=POSITIONS), ids)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(costs_module, "_now", lambda device: time.process_time())  # a busy machine stretches no work
            costs = measure_costs(spec, place, Precision.named("fp32"), batch, seed=1)
        parts = stage_parts(spec, replace(place, costs=costs))
        found.append((astuple(costs), [len(part.layers) for part in parts]))
    return found


@pytest.mark.distributed
def test_a_slow_head_gets_fewer_layers() -> None:
    found, other = run_distributed(splits, 2, {"pp": 2, "split": "measured"}, VOCAB, 30_000)
    assert found == other, "all ranks go by the same costs"
    for costs, layers in found:
        assert min(costs) > 0
        assert sum(layers) == LAYERS
    ((layer, _, last), layers), ((slow_layer, slow_first, slow_last), fewer) = found
    assert last < 2 * layer
    assert layers in ([5, 6], [6, 5])
    assert slow_last > max(4 * slow_layer, slow_first)
    assert fewer[1] <= 3
