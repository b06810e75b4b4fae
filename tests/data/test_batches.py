"""Batches: any slicing over ranks gives the same global batch, targets are right, memories are replayed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from elle_mp.data.batches import BatchBuilder, DomainSamples, sample_key, valid_batches, valid_masking
from elle_mp.data.hashing import compiled_helpers
from elle_mp.data.masking import IGNORED, MlmMasking
from elle_mp.data.packing import PackedSamples

LENGTH, VOCAB, MASK = 8, 1000, 4


def samples_of(domain: int, causal: bool, count: int = 60) -> PackedSamples:
    """A stream in which token, place and domain can be told from each other: domain * 10000 + place."""
    stream = np.arange(count * LENGTH + 1) + 10000 * domain if causal else np.arange(count * LENGTH) % 900 + 10
    return PackedSamples(stream, LENGTH + causal, LENGTH)


def builder(causal: bool = True, **changes: object) -> BatchBuilder:
    """Domain 2 is new, domains 0 and 1 have memories."""
    memories = [
        DomainSamples(0, samples_of(0, causal), np.array([3, 9, 27])),
        DomainSamples(1, samples_of(1, causal), np.array([1, 4, 16, 50])),
    ]
    masking = None if causal else MlmMasking(5, VOCAB, MASK, (0, 1, 2, 3))
    fields: dict[str, object] = dict(
        seed=1,
        stage=2,
        phase=1,
        new=DomainSamples(2, samples_of(2, causal)),
        memories=memories,
        replay=0.25,
        batch=12,
    )
    return BatchBuilder(masking=masking, **(fields | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 3, 12])
def test_ranks_together_have_the_global_batch(causal: bool, ranks: int) -> None:
    for step in (0, 7, 1000):
        whole = builder(causal).batch(step)
        rows = 12 // ranks
        parts = [builder(causal).batch(step, rank * rows, (rank + 1) * rows) for rank in range(ranks)]
        for name in ("tokens", "targets", "domain", "key"):
            together = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(together, getattr(whole, name)) and together.dtype == torch.int64
        assert len(whole) == 12 and whole.tokens.shape == whole.targets.shape == (12, LENGTH)


def test_causal_targets_are_the_next_tokens() -> None:
    for step in range(10):
        batch = builder().batch(step)
        assert torch.equal(batch.targets, batch.tokens + 1)
        assert torch.equal(batch.tokens[:, 0] // 10000, batch.domain)
        assert batch.tokens.is_contiguous() and batch.targets.is_contiguous()
        assert (batch.domain != 2).sum() == 3


def test_replay_stays_within_the_memories() -> None:
    seen: dict[int, set[int]] = {0: set(), 1: set(), 2: set()}
    for step in range(40):
        batch = builder().batch(step)
        for domain, first in zip(batch.domain.tolist(), batch.tokens[:, 0].tolist(), strict=True):
            seen[domain].add(first % 10000 // LENGTH)
    assert seen[0] == {3, 9, 27} and seen[1] == {1, 4, 16, 50} and seen[2] == set(range(60))


def test_recovery_reads_memories_only() -> None:
    batch = builder(new=None, phase=0).batch(3)
    assert set(batch.domain.tolist()) == {0, 1}
    assert abs(int((batch.domain == 0).sum()) - 6) == 0


def test_first_stage_reads_the_new_domain_only() -> None:
    assert set(builder(memories=[], stage=0).batch(3).domain.tolist()) == {2}


def test_keys_are_unique_in_a_run() -> None:
    keys = [
        builder(stage=stage, phase=phase).batch(step).key
        for stage in range(3)
        for phase in range(2)
        for step in range(20)
    ]
    together = torch.cat(keys)
    assert len(together.unique()) == len(together) and (together >= 0).all()
    with pytest.raises(ValueError, match="stage"):
        sample_key(1 << 12, 0, np.arange(2))


def test_masks_change_from_epoch_to_epoch() -> None:
    """The same sample comes with another mask the next time (dynamic masking)."""
    plan = builder(causal=False, memories=[], batch=60)
    first, second = plan.batch(0), plan.batch(1)
    originals = [torch.where(batch.targets != IGNORED, batch.targets, batch.tokens) for batch in (first, second)]
    orders = [sorted(range(60), key=lambda row, text=text: text[row].tolist()) for text in originals]
    assert torch.equal(originals[0][orders[0]], originals[1][orders[1]])
    assert not torch.equal(first.targets[orders[0]], second.targets[orders[1]])


@pytest.mark.parametrize("causal", [True, False])
def test_the_numpy_path_gives_the_same_batches(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if compiled_helpers() is None:
        pytest.skip("the extension is not built")
    compiled = [builder(causal).batch(step) for step in range(5)]
    for module in ("order", "masking", "packing"):
        monkeypatch.setattr(f"elle_mp.data.{module}.compiled_helpers", lambda: None)
    for step, batch in enumerate(compiled):
        again = builder(causal).batch(step)
        assert torch.equal(batch.tokens, again.tokens) and torch.equal(batch.targets, again.targets)


@pytest.mark.parametrize("causal", [True, False])
def test_valid_batches(causal: bool) -> None:
    samples = DomainSamples(1, samples_of(1, causal, count=21))
    masking = valid_masking("causal" if causal else "mlm", 1, VOCAB, MASK, (0, 1, 2, 3))
    whole = list(valid_batches(samples, 8, None, masking))
    assert [len(batch) for batch in whole] == [8, 8, 8]
    keys = torch.cat([batch.key for batch in whole])
    assert keys[:21].tolist() == list(range(21))
    targets = torch.cat([batch.targets for batch in whole])
    assert (targets[21:] == IGNORED).all()
    assert ((targets[:21] != IGNORED).sum(dim=1) >= 1).all()
    assert all((batch.domain == 1).all() for batch in whole)
    by_key = dict(zip(keys[:21].tolist(), targets[:21], strict=True))
    for size, most in ((7, None), (4, 3), (2, 1)):  # a sample's mask is its own, whatever it stands beside
        for batch in valid_batches(samples, size, most, masking):
            for key, row in zip(batch.key.tolist(), batch.targets, strict=True):
                assert torch.equal(row, by_key[key])
    few = torch.cat([batch.key for batch in valid_batches(samples, 4, 2, masking)])
    assert len(set(few.tolist())) == 8 and few.max() > 16  # from all of the text
    assert [len(batch) for batch in valid_batches(samples, 8, 99, masking)] == [8, 8, 8]


def test_shards_of_valid_batches_have_equal_shapes_and_all_rows() -> None:
    samples = DomainSamples(1, samples_of(1, True, count=21))
    shards = [list(valid_batches(samples, 8, None, None, (rank, 4))) for rank in range(4)]
    whole = list(valid_batches(samples, 8))
    assert all([batch.tokens.shape for batch in shard] == [(2, LENGTH)] * 3 for shard in shards)
    for index, batch in enumerate(whole):
        together = torch.cat([shard[index].targets for shard in shards])
        assert torch.equal(together, batch.targets)
    with pytest.raises(ValueError, match="multiple"):
        list(valid_batches(samples, 8, None, None, (0, 3)))


def test_rows_and_to() -> None:
    batch = builder().batch(0)
    part = batch.rows(2, 5).to("cpu")
    assert torch.equal(part.tokens, batch.tokens[2:5]) and len(part) == 3
