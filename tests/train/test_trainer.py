"""One step: every target weighs the same, however the batch is cut; nothing is updated by what is not finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from elle_mp.data.batches import Batch
from elle_mp.errors import UserError
from elle_mp.models.transformer import IGNORED
from elle_mp.train.trainer import StepResult, Trainer, check_finite, rows_of
from tests.distributed_utils import run_distributed
from tests.tiny import FAMILIES, grid, model_of, optimizer_of, spec_of, text, weights

ROWS = 4


def batch_of(rows: int = ROWS) -> Batch:
    """Rows with very different numbers of targets."""
    tokens, domain, targets = text(rows, seed=5)
    targets[0, 1:] = IGNORED
    targets[2, :] = IGNORED
    return Batch(tokens, targets, domain, torch.arange(rows))


def step_of(family: str, micro: int, **parallel: Any) -> tuple[StepResult, dict[str, torch.Tensor]]:
    """One step on this rank's rows, with dropout; the result and the weights after it."""
    place = grid(**parallel)
    model = model_of(spec_of(family, dropout=0.1), place)
    trainer = Trainer(model, optimizer_of(model, lr=1e-2, clip=0.5), micro, dropout_seed=3)
    first, last = rows_of(place, ROWS)
    result = trainer.step(batch_of().rows(first, last), 0.5, lambda: place.dp_rank == 1)
    return result, weights(model)


def two_rank_step(family: str, parallel: dict[str, int]) -> tuple[StepResult, dict[str, torch.Tensor]]:
    return step_of(family, 1, **parallel)


@pytest.mark.parametrize("family", FAMILIES)
def test_micro_batches_change_nothing(family: str) -> None:
    whole, expected = step_of(family, ROWS)
    for micro in (1, 2):
        result, found = step_of(family, micro)
        assert result.loss == pytest.approx(whole.loss, rel=1e-12)
        assert result.grad_norm == pytest.approx(whole.grad_norm, rel=1e-10)
        assert result.targets == whole.targets == 21
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-10)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "parallel", [{"dp_shard": 2}, {"dp_replicate": 2}, {"tp": 2}], ids=lambda item: next(iter(item))
)
def test_uneven_ranks_change_nothing(parallel: dict[str, int]) -> None:
    """Rank 0 has 11 targets and rank 1 has 10; only rank 1 is asked to stop, and both hear of it."""
    whole, expected = step_of("gpt", ROWS)
    for result, found in run_distributed(two_rank_step, 2, "gpt", parallel):
        assert result.loss == pytest.approx(whole.loss, rel=1e-12)
        assert result.grad_norm == pytest.approx(whole.grad_norm, rel=1e-10)
        assert result.targets == 21
        assert result.stop is ("tp" not in parallel)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_step_is_that_of_plain_adamw(family: str) -> None:
    """Against cross entropy on the logits, ``clip_grad_norm_`` and torch's own AdamW on copies of the weights."""
    model = model_of(spec_of(family), grid())
    batch = batch_of()
    plain = model_of(spec_of(family), grid())
    logits = plain(batch.tokens, batch.domain)[..., : plain.spec.vocab_size]
    loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED)
    loss.backward()
    optimizer = optimizer_of(model, lr=1e-2, clip=0.5, weight_decay=0.1, decay="all")
    reference = {name: value.requires_grad_() for name, value in weights(plain).items()}
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None
        reference[name].grad = parameter.grad.full_tensor()  # type: ignore[attr-defined]
    norm = torch.nn.utils.clip_grad_norm_(reference.values(), 0.5)
    torch.optim.AdamW(reference.values(), lr=5e-3, betas=(0.9, 0.98), weight_decay=0.1).step()
    result = Trainer(model, optimizer, 2, dropout_seed=1).step(batch, 0.5)
    assert result.loss == pytest.approx(float(loss.detach()), rel=1e-10)
    assert result.grad_norm == pytest.approx(float(norm), rel=1e-10)
    assert not result.stop
    for name, value in weights(model).items():
        torch.testing.assert_close(value, reference[name].detach(), rtol=1e-6, atol=1e-9)


def test_what_is_not_finite_updates_nothing() -> None:
    model = model_of(spec_of("gpt"), grid())
    optimizer = optimizer_of(model)
    trainer = Trainer(model, optimizer, ROWS, dropout_seed=1)
    trainer.step(batch_of(), 1.0)
    with torch.no_grad():
        optimizer.shards["token_table"].mul_(1e200).mul_(1e200)
    before, moments = weights(model), {name: value.clone() for name, value in optimizer.tensors().items()}
    result = trainer.step(batch_of(), 1.0)
    with pytest.raises(UserError, match=r"stage 1 .*not finite.*optim\.lr"):
        check_finite(result, "stage 1 (a, train), step 5")
    for name, value in weights(model).items():
        torch.testing.assert_close(value, before[name], equal_nan=True, rtol=0, atol=0)
    for name, value in optimizer.tensors().items():
        torch.testing.assert_close(value, moments[name], rtol=0, atol=0)


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (1.0, float("nan")), (float("inf"), 1.0)])
def test_divergence_is_one_line(loss: float, norm: float) -> None:
    with pytest.raises(UserError, match="the last checkpoint is intact"):
        check_finite(StepResult(loss, norm, 1, False), "stage 0")
    check_finite(StepResult(1.0, 1.0, 1, False), "stage 0")
