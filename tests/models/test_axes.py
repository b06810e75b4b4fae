"""Sizes that are not tied to each other: width and heads, frequencies and head size, ids and softmax."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from elle_mp.models.layers import rotary_table
from elle_mp.models.spec import ModelSpec, sizes_of
from elle_mp.models.transformer import Transformer
from elle_mp.parallel.sharding import local_tensor
from elle_mp.stream.evaluation import fixed_logits
from tests.distributed_utils import run_distributed
from tests.tiny import FAMILIES, VOCAB, config_of, gradients, grid, logits, model_of, spec_of, text, weights

CPU = torch.device("cpu")


def fill(model: Transformer, name: str, values: Tensor) -> None:
    with torch.no_grad():
        local_tensor(model.get_parameter(name)).copy_(values)


@pytest.mark.parametrize("family", ["bert", "gpt"])
def test_a_head_more_than_the_width_holds(family: str) -> None:
    """Of five heads over a width of four, a fifth that nobody reads leaves the model of four heads."""
    four = model_of(spec_of(family), grid())
    five = model_of(spec_of(family, heads=5, width=32), grid())
    assert (five.spec.embed, five.spec.heads * five.spec.head_dim) == (32, 40)
    for name, value in weights(four).items():
        target = torch.zeros_like(weights(five)[name])
        part = tuple(slice(0, size) for size in value.shape)
        if name.endswith(("qkv_weight", "qkv_bias")):
            target = weights(five)[name]
        target[part] = value
        fill(five, name, target)
    tokens, domain, _ = text(3)
    torch.testing.assert_close(logits(five, tokens, domain), logits(four, tokens, domain), rtol=1e-12, atol=1e-12)


def test_the_standard_frequencies_are_bitwise_what_they_were() -> None:
    spec = spec_of("llama")
    pairs = torch.arange(0, spec.head_dim, 2, dtype=torch.float64)
    angles = torch.outer(torch.arange(9, dtype=torch.float64), spec.rope_theta ** (-pairs / spec.head_dim))
    given = replace(spec, rope_exponents=tuple(pair / spec.head_dim for pair in range(0, spec.head_dim, 2)))
    for one in (spec, given):
        cos, sin = rotary_table(one, 9, CPU)
        assert torch.equal(cos, angles.cos()) and torch.equal(sin, angles.sin())


def test_given_exponents_are_the_frequencies() -> None:
    exponents = (0.0, 0.25, 0.9, 0.125)
    spec = replace(spec_of("llama", rope_theta=100.0), rope_exponents=exponents)
    cos, sin = rotary_table(spec, 5, CPU)
    for pair, exponent in enumerate(exponents):
        wanted = torch.arange(5, dtype=torch.float64) / 100.0**exponent
        torch.testing.assert_close(cos[:, pair], wanted.cos(), rtol=0, atol=1e-14)
        torch.testing.assert_close(sin[:, pair], wanted.sin(), rtol=0, atol=1e-14)


def test_given_exponents_against_transformers() -> None:
    pytest.importorskip("transformers")
    from tests.models.reference import copy_weights, their_logits, their_model

    spec = replace(spec_of("llama"), prompt_tokens=0, rope_exponents=(0.0, 0.3, 0.55, 0.1))
    ours = model_of(spec, grid())
    theirs = their_model(spec, torch.float64)
    copy_weights(spec, weights(ours), theirs)
    tokens, domain, _ = text(3, length=12)
    wanted = their_logits(spec, theirs, input_ids=tokens)
    torch.testing.assert_close(logits(ours, tokens, domain), wanted, rtol=1e-10, atol=1e-10)
    standard = model_of(replace(spec, rope_exponents=()), grid())
    assert float((logits(standard, tokens, domain) - wanted).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_reserved_ids_get_no_probability_and_no_gradient(family: str) -> None:
    live = 250
    whole = model_of(spec_of(family), grid())
    masked = model_of(replace(whole.spec, live_vocab=live), grid())
    tokens, domain, targets = text(3)
    targets = targets % live
    expected = F.cross_entropy(logits(whole, tokens, domain)[..., :live].flatten(0, 1), targets.flatten())
    loss = masked(tokens, domain, targets) / targets.numel()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-12, atol=0)
    assert logits(masked, tokens, domain).shape[-1] == live
    (masked(tokens % live, domain, targets) / targets.numel()).backward()
    for name in ("token_table", "output_table", "head.table_bias"):
        if name in gradients(masked):
            assert gradients(masked)[name][:live].any() and not gradients(masked)[name][live:].any(), name


def masked_on_two_ranks() -> tuple[float, list[int]]:
    from elle_mp.data.batches import Batch

    place = grid(tp=2)
    model = model_of(replace(spec_of("gpt"), live_vocab=250), place)
    tokens, domain, targets = text(3)
    batch = Batch(tokens, targets % 250, domain, torch.arange(3))
    return float(model(tokens, domain, targets % 250).detach()), list(fixed_logits(model, batch).shape)


def test_reserved_ids_on_two_ranks() -> None:
    one = model_of(replace(spec_of("gpt"), live_vocab=250), grid())
    tokens, domain, targets = text(3)
    wanted = float(one(tokens, domain, targets % 250).detach())
    (first, shape), (second, other) = run_distributed(masked_on_two_ranks, 2)
    assert abs(first - wanted) < 1e-9 * wanted and first == second
    # 320 padded rows, 160 on each rank.
    assert (shape[-1], other[-1]) == (160, 90)


def test_the_configuration_s_ids_are_reserved_beyond_the_tokenizer_s() -> None:
    plain, reserved = spec_of("gpt"), spec_of("gpt", vocab=400)
    assert (plain.vocab_size, plain.padded_vocab, plain.live_vocab, plain.softmax_vocab) == (VOCAB, 320, 0, VOCAB)
    assert (reserved.vocab_size, reserved.padded_vocab, reserved.softmax_vocab) == (400, 448, VOCAB)
    assert "vocab_size" not in sizes_of(config_of("gpt").model)
    sizes = sizes_of(config_of("gpt", vocab=400, seq_len=20, width=24).model)
    assert (sizes["vocab_size"], sizes["padded_vocab"], sizes["positions"], sizes["embed"]) == (400, 448, 20, 24)


def test_a_model_saved_before_these_fields_is_read() -> None:
    spec = spec_of("llama")
    fields: dict[str, Any] = json.loads(json.dumps(spec.to_json()))
    for name in ("rope_exponents", "live_vocab"):
        del fields[name]
    assert ModelSpec.from_json(fields) == spec
    grown = replace(spec, rope_exponents=(0.0, 0.5), live_vocab=7)
    assert ModelSpec.from_json(json.loads(json.dumps(grown.to_json()))) == grown
