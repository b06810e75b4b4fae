"""FSDP2's gathered copies never stand in for the masters."""

from __future__ import annotations

import pytest
import torch

from elle_mp.config import Config, ParallelConfig
from elle_mp.data.batches import Batch
from elle_mp.models.build import Precision, empty_model
from elle_mp.models.spec import ModelSpec
from elle_mp.parallel.mesh import make_grid
from elle_mp.parallel.sharding import initialise
from elle_mp.stream.evaluation import fixed_logits, perplexity
from tests.distributed_utils import run_distributed


def masters_after_evaluation() -> list[tuple[str, str]]:
    """Names and dtypes of parameters that evaluation left as gathered copies."""
    tree = {
        "model": {"family": "gpt", "layers": 2, "heads": 2, "head_dim": 8, "seq_len": 17},
        "stream": [{"domain": "a", "data": "a.txt", "steps": 1}],
    }
    grid = make_grid(ParallelConfig(), torch.device("cpu"))
    model = empty_model(ModelSpec.from_config(Config.model_validate(tree), 300), grid, Precision.named("bf16"))
    initialise(model, 1)
    before = {name: id(item) for name, item in model.named_parameters()}
    ids = torch.arange(32).view(2, 16)
    batch = Batch(ids, ids, torch.zeros(2, dtype=torch.int64), torch.arange(2))
    perplexity(model, [batch])
    fixed_logits(model, batch)
    after = model.named_parameters()
    return [(name, str(item.dtype)) for name, item in after if id(item) != before[name] or item.dtype != torch.float32]


@pytest.mark.distributed
def test_evaluation_leaves_the_masters_in_place() -> None:
    """A checkpoint right after an evaluation would otherwise hold bf16 copies, and resume would not be exact."""
    assert run_distributed(masters_after_evaluation, 1) == [[]]
