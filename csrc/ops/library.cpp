// The ops torch.ops.elle_mp.*, on torch's stable ABI: one build serves torch 2.11 and later and every Python.

#include <torch/csrc/stable/library.h>

#include <string>

#include "attention.h"
#include "cross_entropy.h"
#include "levels.h"
#include "norms.h"
#include "philox.h"
#include "prompt_embedding.h"

namespace elle_mp {
namespace {

std::string Instructions() { return LevelName(); }

}  // namespace
}  // namespace elle_mp

STABLE_TORCH_LIBRARY(elle_mp, m) {
    m.def("instructions() -> str");
    m.def(
        "expanded_attention(Tensor q, Tensor k, Tensor v, Tensor kv_map, Tensor seen, Tensor sample_keys, "
        "Tensor positions, int first_head, int threshold, float scale) -> (Tensor, Tensor)");
    m.def(
        "expanded_attention_backward(Tensor grad, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor "
        "out, "
        "Tensor lse, Tensor kv_map, Tensor seen, Tensor sample_keys, Tensor positions, int first_head, "
        "int threshold, float scale) -> (Tensor, Tensor, Tensor)");
    m.def(
        "packed_attention(Tensor qkv, Tensor seen, Tensor sample_keys, Tensor positions, int first_head, "
        "int threshold, float scale) -> (Tensor, Tensor)");
    m.def(
        "packed_attention_backward(Tensor grad, Tensor? grad_lse, Tensor qkv, Tensor out, Tensor lse, Tensor "
        "seen, "
        "Tensor sample_keys, Tensor positions, int first_head, int threshold, float scale) -> Tensor");
    m.def("logit_statistics(Tensor logits, Tensor targets) -> Tensor");
    m.def(
        "logit_gradient(Tensor(a!) logits, Tensor targets, Tensor lse, Tensor factors, float hit, float "
        "uniform) -> ()");
    m.def("philox_normal(Tensor(a!) out, int key, int start, int stride) -> ()");
    m.def(
        "add_norm(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, Tensor? stat_weights, Tensor? "
        "keys, int first_row, int threshold, float eps, bool rms) -> (Tensor, Tensor, Tensor)");
    m.def(
        "add_norm_backward(Tensor dy, Tensor? dh, Tensor h, Tensor weight, Tensor? stat_weights, Tensor "
        "statistics, Tensor? keys, int first_row, int threshold, bool rms) -> (Tensor, Tensor, Tensor)");
    m.def(
        "prompt_embedding(Tensor table, Tensor? prompt_table, Tensor? position_table, Tensor? weight, "
        "Tensor? bias, Tensor ids, Tensor at, Tensor? domains, Tensor? stat_weights, Tensor? keys, int "
        "start, int threshold, float eps) -> (Tensor, Tensor)");
    m.def(
        "prompt_embedding_backward(Tensor dy, Tensor? statistics, Tensor table, Tensor? prompt_table, "
        "Tensor? position_table, Tensor? weight, Tensor ids, Tensor at, Tensor? domains, Tensor? "
        "stat_weights, Tensor? keys, int start, int threshold) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(elle_mp, CPU, m) {
    m.impl("prompt_embedding", TORCH_BOX(&elle_mp::PromptEmbedding));
    m.impl("prompt_embedding_backward", TORCH_BOX(&elle_mp::PromptEmbeddingBackward));
    m.impl("add_norm", TORCH_BOX(&elle_mp::AddNorm));
    m.impl("add_norm_backward", TORCH_BOX(&elle_mp::AddNormBackward));
    m.impl("logit_statistics", TORCH_BOX(&elle_mp::LogitStatistics));
    m.impl("philox_normal", TORCH_BOX(&elle_mp::PhiloxNormal));
    m.impl("logit_gradient", TORCH_BOX(&elle_mp::LogitGradient));
    m.impl("expanded_attention", TORCH_BOX(&elle_mp::AttentionForward));
    m.impl("expanded_attention_backward", TORCH_BOX(&elle_mp::AttentionBackward));
    m.impl("packed_attention", TORCH_BOX(&elle_mp::PackedForward));
    m.impl("packed_attention_backward", TORCH_BOX(&elle_mp::PackedBackward));
}

STABLE_TORCH_LIBRARY_IMPL(elle_mp, CompositeExplicitAutograd, m) {
    m.impl("instructions", TORCH_BOX(&elle_mp::Instructions));
}
