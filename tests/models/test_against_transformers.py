"""bert, gpt and llama against Hugging Face's RoBERTa, GPT-2 and Llama with the same weights, in fp64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from elle_mp.models.spec import ModelSpec
from elle_mp.models.transformer import IGNORED
from tests.models.reference import copy_weights, links, their_logits, their_model, token_table
from tests.tiny import VOCAB, gradients, grid, logits, model_of, spec_of, text, weights

pytest.importorskip("transformers")

MODELS: dict[str, dict[str, Any]] = {
    "bert": {"family": "bert"},
    "gpt": {"family": "gpt"},
    "gpt untied": {"family": "gpt", "tied": False},
    "llama": {"family": "llama", "kv_groups": 4, "rope_theta": 500.0},
    "llama tied": {"family": "llama", "kv_groups": 4, "tied": True},
    "llama GQA": {"family": "llama", "kv_groups": 2},
    "llama one group": {"family": "llama", "kv_groups": 1},
    "llama, narrow": {"family": "llama", "kv_groups": 2, "width": 20},
    "llama, wide": {"family": "llama", "kv_groups": 2, "width": 44, "tied": True},
}


def named(model: str, prompts: int, dtype: torch.dtype = torch.float64) -> tuple[ModelSpec, Any, Any]:
    """The spec, our model and theirs with our weights."""
    spec = replace(spec_of(**MODELS[model]), prompt_tokens=prompts)
    ours = model_of(spec, grid(), dtype)
    theirs = their_model(spec, dtype, exact=dtype == torch.float64)
    copy_weights(spec, weights(ours), theirs)
    return spec, ours, theirs


def close(ours: Tensor, theirs: Tensor, tolerance: float, what: str = "", scale: float | None = None) -> None:
    """Equal, relative to the tensor's largest entry (or to ``scale``)."""
    assert ours.shape == theirs.shape, what
    difference = float((ours - theirs).detach().abs().max()) / (scale or float(theirs.detach().abs().max()))
    assert difference < tolerance, f"{what}: {difference}"


@pytest.mark.parametrize("model", MODELS)
def test_logits_loss_and_every_gradient(model: str) -> None:
    spec, ours, theirs = named(model, prompts=0)
    tokens, domain, targets = text(3, length=12)
    targets[0, ::2] = IGNORED
    targets[1, 3:] = IGNORED
    expected = their_logits(spec, theirs, input_ids=tokens)
    close(logits(ours, tokens, domain), expected, 1e-10, "logits")

    loss = ours(tokens, domain, targets)
    wanted = F.cross_entropy(expected.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    close(loss.detach(), wanted.detach(), 1e-12, "loss")
    loss.backward()
    wanted.backward()
    got = gradients(ours)
    compared = set()
    for name, read, parameter in links(spec, theirs):
        gradient = parameter.grad if parameter.is_leaf else position_gradient(theirs)
        # (The gradient of a key's bias is zero: softmax does not see it. So: of the whole tensor's largest.)
        close(read(got[name]), gradient, 1e-10, name, scale=float(got[name].abs().max()))
        compared.add(name)
    assert compared == set(got)
    for name in ("token_table", "output_table", "head.table_bias"):
        if name in got:
            assert not got[name][VOCAB:].any(), f"the padding of {name} has a gradient"


def position_gradient(theirs: Any) -> Tensor:
    """Of RoBERTa's positions, without the two that are never used."""
    gradient = theirs.roberta.embeddings.position_embeddings.weight.grad
    assert not gradient[:2].any()
    return gradient[2:]


@pytest.mark.parametrize("model", ["bert", "gpt", "llama GQA"])
def test_fp32_against_their_code_as_it_is(model: str) -> None:
    spec, ours, theirs = named(model, prompts=0, dtype=torch.float32)
    tokens, domain, _ = text(3, length=12)
    close(logits(ours, tokens, domain), their_logits(spec, theirs, input_ids=tokens), 2e-5, "logits")


@pytest.mark.parametrize("model", ["bert", "gpt", "gpt untied", "llama GQA"])
def test_prompts_are_embeddings_in_front_of_the_text(model: str) -> None:
    spec, ours, theirs = named(model, prompts=2)
    tokens, domain, targets = text(4)
    table = weights(ours)["prompt_table"].requires_grad_()
    embeddings = torch.cat((table[domain], token_table(spec, theirs)(tokens)), dim=1)
    expected = their_logits(spec, theirs, inputs_embeds=embeddings)[:, 2:]
    close(logits(ours, tokens, domain), expected, 1e-10, "logits")

    ours(tokens, domain, targets).backward()
    F.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    got = gradients(ours)
    assert table.grad is not None
    close(got["prompt_table"], table.grad, 1e-10, "prompt_table")
    for name, read, parameter in links(spec, theirs):
        gradient = parameter.grad if parameter.is_leaf else position_gradient(theirs)
        # (The gradient of a key's bias is zero: softmax does not see it. So: of the whole tensor's largest.)
        close(read(got[name]), gradient, 1e-10, name, scale=float(got[name].abs().max()))


@pytest.mark.parametrize("family", ["bert", "gpt", "llama"])
def test_a_sequence_sees_its_own_domain_s_prompt_only(family: str) -> None:
    model = model_of(spec_of(family), grid())
    tokens, domain, targets = text(6)
    before = logits(model, tokens, domain)
    with torch.no_grad():
        model.get_parameter("prompt_table").to_local()[1].neg_()
    after = logits(model, tokens, domain)
    assert torch.equal(before[domain == 0], after[domain == 0])
    assert bool(((before - after).abs().amax((1, 2)) > 1e-3).equal(domain == 1))
    model(tokens, torch.zeros_like(domain), targets).backward()
    gradient = gradients(model)["prompt_table"]
    assert gradient[0].any() and not gradient[1].any()


@pytest.mark.parametrize("family", ["bert", "gpt", "llama"])
def test_only_text_is_predicted(family: str) -> None:
    model = model_of(spec_of(family), grid())
    tokens, domain, targets = text(3)
    targets[:, ::3] = IGNORED
    out = logits(model, tokens, domain)
    assert out.shape == (3, 10, VOCAB)
    expected = F.cross_entropy(out.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    loss = model(tokens, domain, targets)
    close(loss.detach(), expected, 1e-13, "loss")
    nothing = model(tokens, domain, torch.full_like(targets, IGNORED))
    assert float(nothing.detach()) == 0.0
    nothing.backward()
    assert not any(gradient.any() for gradient in gradients(model).values())


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_causal_models_do_not_look_ahead_and_see_the_prompt(family: str) -> None:
    model = model_of(spec_of(family), grid())
    tokens, domain, _ = text(3)
    changed = tokens.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % VOCAB
    before, after = logits(model, tokens, domain), logits(model, changed, domain)
    assert torch.equal(before[:, :6], after[:, :6])
    assert float((before[:, 6:] - after[:, 6:]).abs().amax(-1).min()) > 1e-3
    other = logits(model, tokens, 1 - domain)
    assert float((before[:, 0] - other[:, 0]).abs().max()) > 1e-3


def test_bert_looks_both_ways() -> None:
    model = model_of(spec_of("bert"), grid())
    tokens, domain, _ = text(3)
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % VOCAB
    difference = (logits(model, tokens, domain) - logits(model, changed, domain)).abs().amax(-1)
    assert float(difference.min()) > 1e-6


@pytest.mark.parametrize("family", ["bert", "gpt", "llama"])
def test_dropout_acts_while_training_only_and_follows_its_key(family: str) -> None:
    from elle_mp.ops.dropout import DropoutKey

    model = model_of(spec_of(family, dropout=0.1, attention_dropout=0.0), grid())
    plain = model_of(spec_of(family), grid())
    tokens, domain, targets = text(3)
    samples = torch.tensor([4, 5, 6])
    with torch.no_grad():
        without = model(tokens, domain, targets)
        assert torch.equal(without, plain(tokens, domain, targets))
        one = model(tokens, domain, targets, DropoutKey(1, samples))
        assert torch.equal(one, model(tokens, domain, targets, DropoutKey(1, samples)))
        others = [DropoutKey(2, samples), DropoutKey(1, samples + 1), None]
        losses = [float(one)] + [float(model(tokens, domain, targets, key)) for key in others]
        assert len(set(losses)) == 4
        turn = torch.tensor([2, 0, 1])
        turned = model(tokens[turn], domain[turn], targets[turn], DropoutKey(1, samples[turn]))
        close(turned, one, 1e-13, "order of the samples")


def test_bf16_is_near_fp32() -> None:
    from elle_mp.models.build import Precision, empty_model
    from elle_mp.parallel.sharding import initialise

    tokens, domain, targets = text(4)
    for family in ("bert", "gpt", "llama"):
        losses, sizes = [], []
        for name in ("fp32", "bf16"):
            model = empty_model(spec_of(family), grid(), Precision.named(name))
            initialise(model, 1)
            loss = model(tokens, domain, targets)
            loss.backward()
            assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
            assert all(gradient.dtype == torch.float32 for gradient in gradients(model).values())
            losses.append(float(loss.detach()))
            sizes.append(torch.cat([gradient.flatten() for gradient in gradients(model).values()]))
        assert abs(losses[1] - losses[0]) < 2e-3 * losses[0]
        assert float(F.cosine_similarity(sizes[0], sizes[1], dim=0)) > 0.995
