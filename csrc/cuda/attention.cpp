#include "attention_call.h"

namespace elle_mp {
namespace {

// -> out [B, Sq, H, D], lse fp32 [B, H, Sq].
std::tuple<Tensor, Tensor> Forward(AttentionCall& call, const Tensor& like) {
    Attention& work = call.work;
    const Tensor out = EmptyOf(like, {work.batch, work.queries, work.heads, work.dim}, like.scalar_type());
    const Tensor lse = EmptyOf(like, {work.batch, work.heads, work.queries}, ScalarType::Float);
    if (call.empty()) return {out, lse};
    work.out = RowsOf(out);
    work.lse = DataOf<float>(lse);
    call.MakeRoom();
    Check(RunAttentionForward(work, call.type(), call.device.stream()));
    return {out, lse};
}

std::tuple<Tensor, Tensor> AttentionForward(Tensor q, Tensor k, Tensor v, Tensor kv_map, Tensor seen,
                                            Tensor sample_keys, Tensor positions, int64_t first_head,
                                            int64_t threshold, double scale) {
    AttentionCall call(q, k, v, kv_map);
    call.Describe(seen, sample_keys, positions, first_head, threshold, scale);
    return Forward(call, q);
}

std::tuple<Tensor, Tensor> PackedForward(Tensor qkv, Tensor seen, Tensor sample_keys, Tensor positions,
                                         int64_t first_head, int64_t threshold, double scale) {
    AttentionCall call(qkv);
    call.Describe(seen, sample_keys, positions, first_head, threshold, scale);
    return Forward(call, qkv);
}

// Where the gradients go has been said.
void Backward(AttentionCall& call, const Tensor& like, const Tensor& grad,
              const std::optional<Tensor>& grad_lse, const Tensor& out, const Tensor& lse) {
    Attention& work = call.work;
    const std::vector<int64_t> expected{work.batch, work.queries, work.heads, work.dim};
    for (const Tensor* x : {&grad, &out})
        STD_TORCH_CHECK(
            SizesOf(*x) == expected && x->scalar_type() == like.scalar_type() && x->is_cpu() == like.is_cpu(),
            "grad or out does not fit");
    const int64_t rows = static_cast<int64_t>(work.batch) * work.heads * work.queries;
    CheckFits(lse, like, ScalarType::Float, rows, "lse");
    work.lse = DataOf<float>(lse);
    if (grad_lse) {
        const Tensor& kept = call.Keep(torch::stable::contiguous(*grad_lse));
        CheckFits(kept, like, ScalarType::Float, rows, "grad_lse");
        work.grad_lse = DataOf<const float>(kept);
    }
    if (work.batch == 0 || work.dim == 0) return;
    work.grad = RowsOf(call.Keep(grad));
    work.out = RowsOf(call.Keep(out));
    work.delta = call.Scratch<float>(rows);
    call.MakeRoom();
    Check(RunAttentionBackward(work, call.type(), call.device.stream()));
}

std::tuple<Tensor, Tensor, Tensor> AttentionBackward(Tensor grad, std::optional<Tensor> grad_lse, Tensor q,
                                                     Tensor k, Tensor v, Tensor out, Tensor lse,
                                                     Tensor kv_map, Tensor seen, Tensor sample_keys,
                                                     Tensor positions, int64_t first_head, int64_t threshold,
                                                     double scale) {
    AttentionCall call(q, k, v, kv_map);
    call.Describe(seen, sample_keys, positions, first_head, threshold, scale);
    const Tensor dq = EmptyOf(q, SizesOf(q), q.scalar_type());
    const Tensor dk = EmptyOf(k, SizesOf(k), k.scalar_type());
    const Tensor dv = EmptyOf(v, SizesOf(v), v.scalar_type());
    call.work.dq = RowsOf(dq);
    call.work.dk = RowsOf(dk);
    call.work.dv = RowsOf(dv);
    Backward(call, q, grad, grad_lse, out, lse);
    return {dq, dk, dv};
}

Tensor PackedBackward(Tensor grad, std::optional<Tensor> grad_lse, Tensor qkv, Tensor out, Tensor lse,
                      Tensor seen, Tensor sample_keys, Tensor positions, int64_t first_head,
                      int64_t threshold, double scale) {
    AttentionCall call(qkv);
    call.Describe(seen, sample_keys, positions, first_head, threshold, scale);
    const Tensor gradient = EmptyOf(qkv, SizesOf(qkv), qkv.scalar_type());
    const PackedRows rows(gradient);
    call.work.dq = rows.q;
    call.work.dk = rows.k;
    call.work.dv = rows.v;
    Backward(call, qkv, grad, grad_lse, out, lse);
    return gradient;
}

}  // namespace
}  // namespace elle_mp

STABLE_TORCH_LIBRARY_IMPL(ELLE_LIBRARY, ELLE_KEY, m) {
    m.impl("expanded_attention", TORCH_BOX(&elle_mp::AttentionForward));
    m.impl("packed_attention", TORCH_BOX(&elle_mp::PackedForward));
    m.impl("expanded_attention_backward", TORCH_BOX(&elle_mp::AttentionBackward));
    m.impl("packed_attention_backward", TORCH_BOX(&elle_mp::PackedBackward));
}
