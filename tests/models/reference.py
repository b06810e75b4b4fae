"""Our weights in Hugging Face's models: the independent statement of what bert, gpt and llama compute.

Their code computes rotary tables, RMSNorm and eager softmax in fp32 whatever the model's type. For comparison
in fp64 the first two are replaced by torch's own; SDPA attention is fp64 as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from elle_mp.models.spec import ModelSpec

Link = tuple[str, Any, Any]
"""Our parameter's name, how to read our tensor in their layout, and their parameter."""


def their_model(spec: ModelSpec, dtype: torch.dtype, exact: bool = True) -> nn.Module:
    """An empty model of the spec's family and sizes, in evaluation mode."""
    make = {"gpt": _gpt2, "bert": _roberta, "llama": _llama}[spec.family]
    model = make(spec).to(dtype).eval()
    if exact and spec.family == "llama":
        _make_exact(model, spec)
    return model


def _gpt2(spec: ModelSpec) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=spec.vocab_size,
            n_positions=spec.positions,
            n_embd=spec.embed,
            n_layer=spec.layers,
            n_head=spec.heads,
            n_inner=spec.mlp,
            layer_norm_epsilon=spec.norm_eps,
            tie_word_embeddings=spec.tied,
            attn_implementation="sdpa",
        )
    )


def _roberta(spec: ModelSpec) -> nn.Module:
    from transformers import RobertaConfig, RobertaForMaskedLM

    return RobertaForMaskedLM(
        RobertaConfig(
            vocab_size=spec.vocab_size,
            max_position_embeddings=spec.positions + 2,
            hidden_size=spec.embed,
            num_hidden_layers=spec.layers,
            num_attention_heads=spec.heads,
            intermediate_size=spec.mlp,
            layer_norm_eps=spec.norm_eps,
            type_vocab_size=1,
            pad_token_id=1,
            attn_implementation="sdpa",
        )
    )


def _llama(spec: ModelSpec) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=spec.vocab_size,
            hidden_size=spec.embed,
            num_hidden_layers=spec.layers,
            num_attention_heads=spec.heads,
            num_key_value_heads=spec.kv_groups,
            head_dim=spec.head_dim,
            intermediate_size=spec.mlp,
            rms_norm_eps=spec.norm_eps,
            tie_word_embeddings=spec.tied,
            max_position_embeddings=64,
            rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta},
            attn_implementation="sdpa",
        )
    )


def _make_exact(model: Any, spec: ModelSpec) -> None:
    def rotary(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        standard = [pair / spec.head_dim for pair in range(0, spec.head_dim, 2)]
        frequency = spec.rope_theta ** -torch.tensor(spec.rope_exponents or standard, dtype=torch.float64)
        angle = position_ids[..., None].double() * frequency
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos(), angle.sin()

    model.model.rotary_emb.forward = rotary

    def exact_norm() -> nn.RMSNorm:
        return nn.RMSNorm(spec.embed, eps=spec.norm_eps, dtype=torch.float64)

    for layer in model.model.layers:
        layer.input_layernorm, layer.post_attention_layernorm = exact_norm(), exact_norm()
    model.model.norm = exact_norm()


def links(spec: ModelSpec, theirs: Any) -> list[Link]:
    """Where each of our parameters stands in their model (the prompts and the gates aside)."""
    make = {"gpt": _gpt2_links, "bert": _roberta_links, "llama": _llama_links}[spec.family]
    return make(spec, theirs)


def _same(x: Tensor) -> Tensor:
    return x


def _transposed(x: Tensor) -> Tensor:
    return x.t()


def _slot(spec: ModelSpec, first: int, last: int) -> Any:
    """Rows of the slots ``first`` to ``last`` of every group, of a weight or a bias."""

    def read(x: Tensor) -> Tensor:
        by_slot = x.view(spec.kv_groups, spec.queries + 2, spec.head_dim, *x.shape[1:])
        return by_slot[:, first:last].reshape(-1, *x.shape[1:])

    return read


def _gpt2_links(spec: ModelSpec, theirs: Any) -> list[Link]:
    body = theirs.transformer

    def stacked(x: Tensor) -> Tensor:
        return torch.cat([_slot(spec, slot, slot + 1)(x) for slot in range(3)])

    out: list[Link] = [
        ("token_table", lambda x: x[: spec.vocab_size], body.wte.weight),
        ("position_table", _same, body.wpe.weight),
        ("final_norm.weight", _same, body.ln_f.weight),
        ("final_norm.bias", _same, body.ln_f.bias),
    ]
    for index, layer in enumerate(body.h):
        at = f"layers.{index}"
        out += [
            (f"{at}.attention_norm.weight", _same, layer.ln_1.weight),
            (f"{at}.attention_norm.bias", _same, layer.ln_1.bias),
            (f"{at}.attention.qkv_weight", lambda x: stacked(x).t(), layer.attn.c_attn.weight),
            (f"{at}.attention.qkv_bias", stacked, layer.attn.c_attn.bias),
            (f"{at}.attention.out_weight", _transposed, layer.attn.c_proj.weight),
            (f"{at}.attention.out_bias", _same, layer.attn.c_proj.bias),
            (f"{at}.mlp_norm.weight", _same, layer.ln_2.weight),
            (f"{at}.mlp_norm.bias", _same, layer.ln_2.bias),
            (f"{at}.mlp.in_weight", _transposed, layer.mlp.c_fc.weight),
            (f"{at}.mlp.in_bias", _same, layer.mlp.c_fc.bias),
            (f"{at}.mlp.out_weight", _transposed, layer.mlp.c_proj.weight),
            (f"{at}.mlp.out_bias", _same, layer.mlp.c_proj.bias),
        ]
    if not spec.tied:
        out.append(("output_table", lambda x: x[: spec.vocab_size], theirs.lm_head.weight))
    return out


def _roberta_links(spec: ModelSpec, theirs: Any) -> list[Link]:
    body, head = theirs.roberta, theirs.lm_head

    def real(x: Tensor) -> Tensor:
        return x[: spec.vocab_size]

    out: list[Link] = [
        ("token_table", real, body.embeddings.word_embeddings.weight),
        # RoBERTa's positions start at 2.
        ("position_table", _same, body.embeddings.position_embeddings.weight[2:]),
        ("embedding_norm.weight", _same, body.embeddings.LayerNorm.weight),
        ("embedding_norm.bias", _same, body.embeddings.LayerNorm.bias),
        ("head.dense_weight", _same, head.dense.weight),
        ("head.dense_bias", _same, head.dense.bias),
        ("head.norm.weight", _same, head.layer_norm.weight),
        ("head.norm.bias", _same, head.layer_norm.bias),
        ("head.table_bias", real, head.bias),
    ]
    for index, layer in enumerate(body.encoder.layer):
        at = f"layers.{index}"
        attention = layer.attention.self
        for slot, linear in enumerate((attention.query, attention.key, attention.value)):
            out.append((f"{at}.attention.qkv_weight", _slot(spec, slot, slot + 1), linear.weight))
            out.append((f"{at}.attention.qkv_bias", _slot(spec, slot, slot + 1), linear.bias))
        for ours, module in (
            ("attention.out", layer.attention.output.dense),
            ("mlp.in", layer.intermediate.dense),
            ("mlp.out", layer.output.dense),
        ):
            out += [(f"{at}.{ours}_weight", _same, module.weight), (f"{at}.{ours}_bias", _same, module.bias)]
        for ours, module in (
            ("attention_norm", layer.attention.output.LayerNorm),
            ("mlp_norm", layer.output.LayerNorm),
        ):
            out += [(f"{at}.{ours}.weight", _same, module.weight), (f"{at}.{ours}.bias", _same, module.bias)]
    return out


def _llama_links(spec: ModelSpec, theirs: Any) -> list[Link]:
    body = theirs.model

    def gate_or_up(which: int) -> Any:
        return lambda x: x.view(spec.mlp, 2, spec.embed)[:, which]

    out: list[Link] = [
        ("token_table", lambda x: x[: spec.vocab_size], body.embed_tokens.weight),
        ("final_norm.weight", _same, body.norm.weight),
    ]
    for index, layer in enumerate(body.layers):
        at = f"layers.{index}"
        q = spec.queries
        out += [
            (f"{at}.attention_norm.weight", _same, layer.input_layernorm.weight),
            (f"{at}.attention.qkv_weight", _slot(spec, 0, q), layer.self_attn.q_proj.weight),
            (f"{at}.attention.qkv_weight", _slot(spec, q, q + 1), layer.self_attn.k_proj.weight),
            (f"{at}.attention.qkv_weight", _slot(spec, q + 1, q + 2), layer.self_attn.v_proj.weight),
            (f"{at}.attention.out_weight", _same, layer.self_attn.o_proj.weight),
            (f"{at}.mlp_norm.weight", _same, layer.post_attention_layernorm.weight),
            (f"{at}.mlp.in_weight", gate_or_up(0), layer.mlp.gate_proj.weight),
            (f"{at}.mlp.in_weight", gate_or_up(1), layer.mlp.up_proj.weight),
            (f"{at}.mlp.out_weight", _same, layer.mlp.down_proj.weight),
        ]
    if not spec.tied:
        out.append(("output_table", lambda x: x[: spec.vocab_size], theirs.lm_head.weight))
    return out


@torch.no_grad()
def copy_weights(spec: ModelSpec, ours: dict[str, Tensor], theirs: Any) -> None:
    """Fills their model; every one of their parameters is written, or a test compares with random values."""
    written = set()
    for name, read, parameter in links(spec, theirs):
        parameter.copy_(read(ours[name]))
        written.add(parameter.untyped_storage().data_ptr())
    for name, parameter in theirs.named_parameters():
        if parameter.untyped_storage().data_ptr() not in written:
            # RoBERTa's segments are the one thing that ours does not have.
            assert "token_type_embeddings" in name, name
            parameter.zero_()


def their_logits(spec: ModelSpec, theirs: Any, **inputs: Tensor) -> Tensor:
    """Their forward pass over ``input_ids`` or ``inputs_embeds``."""
    if spec.family == "bert":
        given = next(iter(inputs.values()))
        positions = torch.arange(given.shape[1]) + 2
        inputs["position_ids"] = positions.expand(given.shape[0], -1)
    if spec.family != "bert":
        inputs["use_cache"] = False  # type: ignore[assignment]
    return theirs(**inputs).logits


def token_table(spec: ModelSpec, theirs: Any) -> nn.Embedding:
    """Their input embedding."""
    return theirs.get_input_embeddings()
