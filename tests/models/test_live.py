"""What changes in a model that is training: statistics on their way back to plain, ids that come alive."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from elle_mp.models.live import anneal_norms, open_vocabulary, settle_norms
from elle_mp.models.transformer import Transformer
from tests.tiny import grid, logits, model_of, spec_of, text, weights

WIDTH = 32


def weighted(family: str) -> tuple[Transformer, torch.Tensor]:
    """A model whose statistics weigh the first channels less, and those weights."""
    model = model_of(replace(spec_of(family), weighted_norms=True), grid())
    stats = torch.linspace(1, 3, WIDTH, dtype=torch.float64)
    stats /= stats.sum()
    assert model.norm_stats is not None
    model.norm_stats.copy_(stats)
    return model, stats


@pytest.mark.parametrize("family", ["gpt", "bert"])
def test_annealing_is_a_straight_line_that_ends_in_a_plain_model(family: str) -> None:
    model, start = weighted(family)
    uniform, steps = 1.0 / WIDTH, 7
    tokens, domain, _ = text(3)
    seen = [logits(model, tokens, domain)]
    for step in range(steps):
        assert not settle_norms(model)
        anneal_norms(model, steps - step)
        assert model.norm_stats is not None
        share = (step + 1) / steps
        torch.testing.assert_close(model.norm_stats, start + (uniform - start) * share, rtol=1e-14, atol=0)
        assert float(model.norm_stats.sum()) == pytest.approx(1, rel=1e-14)
        seen.append(logits(model, tokens, domain))
    assert bool((model.norm_stats == uniform).all())
    assert all(float((one - other).abs().max()) > 1e-6 for one, other in pairwise(seen))

    assert settle_norms(model) and settle_norms(model)
    assert model.norm_stats is None and not model.spec.weighted_norms
    assert "norm_stats" not in dict(model.named_buffers()) and "norm_stats" not in model.state_dict()
    plain = model_of(spec_of(family), grid())
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(model).items())
    assert model.spec == plain.spec
    after = logits(model, tokens, domain)
    assert torch.equal(after, logits(plain, tokens, domain))
    torch.testing.assert_close(after, seen[-1], rtol=1e-11, atol=1e-11)


def test_a_settled_model_trains_like_a_plain_one() -> None:
    model, _ = weighted("bert")
    anneal_norms(model, 1)
    settle_norms(model)
    plain = model_of(spec_of("bert"), grid())
    tokens, domain, targets = text(3)
    for one in (model, plain):
        one(tokens, domain, targets).backward()
    pairs = zip(model.named_parameters(), plain.parameters(), strict=True)
    for (name, mine), theirs in pairs:
        assert mine.grad is not None and theirs.grad is not None
        assert torch.equal(mine.grad.to_local(), theirs.grad.to_local()), name


def test_plain_norms_have_nothing_to_anneal() -> None:
    model = model_of(spec_of("llama"), grid())
    anneal_norms(model, 3)
    assert model.norm_stats is None and settle_norms(model)
    with pytest.raises(ValueError, match="remaining=0"):
        anneal_norms(model, 0)


def test_ids_come_alive_and_stay_so() -> None:
    model = model_of(replace(spec_of("gpt"), live_vocab=200), grid())
    tokens, domain, _ = text(3)
    masked = logits(model, tokens, domain)
    open_vocabulary(model, 150)
    assert model.spec.softmax_vocab == 200
    open_vocabulary(model, 250)
    assert model.spec.live_vocab == 250 and all(block.spec == model.spec for block in model.layers.values())
    opened = logits(model, tokens, domain)
    assert opened.shape[-1] == 250 and torch.equal(opened[..., :200], masked)
    open_vocabulary(model, 300)
    assert model.spec == spec_of("gpt")
    with pytest.raises(ValueError, match="301 ids, and the model has 300"):
        open_vocabulary(model, 301)
