#include "attention.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "levels.h"

namespace elle_mp {
namespace {

using torch::headeronly::ScalarType;

constexpr std::size_t kAlignment = 64;
// Of packed keys and values that are made at a time: 4 MB.
constexpr int64_t kPackedFloats = 1 << 20;

struct Free {
    void operator()(float* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float, Free>;

Buffer Allocate(int64_t floats) {
    const std::size_t bytes = std::max<int64_t>(floats, 1) * sizeof(float);
    void* p = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
    if (p == nullptr) throw std::bad_alloc();
    return Buffer(static_cast<float*>(p));
}

// Calls body(item, scratch) for each item once; which thread takes which is left to chance, so an item's
// result must be its own.
template <typename F>
void ForItems(int64_t items, int64_t scratch, const F& body) {
    const int64_t threads = std::min<int64_t>(items, torch::stable::get_num_threads());
    if (threads <= 0) return;
    const int64_t each = (scratch + kGroup - 1) / kGroup * kGroup;
    const Buffer buffer = Allocate(threads * each);
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t thread = begin; thread < end; ++thread)
            for (int64_t item = next.fetch_add(1); item < items; item = next.fetch_add(1))
                body(item, buffer.get() + thread * each);
    });
}

Tensor UnitStride(const Tensor& x) {
    return x.numel() == 0 || x.size(x.dim() - 1) == 1 || x.stride(x.dim() - 1) == 1
               ? x
               : torch::stable::contiguous(x);
}

Tensor EmptyLike(const Tensor& x, const std::vector<int64_t>& sizes, ScalarType type) {
    return torch::stable::empty(sizes, type, std::nullopt, x.device());
}

std::vector<int64_t> Sizes(const Tensor& x) {
    std::vector<int64_t> sizes;
    for (int64_t i = 0; i < x.dim(); ++i) sizes.push_back(x.size(i));
    return sizes;
}

// Offsets of evenly spaced heads.
std::vector<int64_t> Heads(int64_t count, int64_t stride) {
    std::vector<int64_t> heads;
    for (int64_t h = 0; h < count; ++h) heads.push_back(h * stride);
    return heads;
}

// Rows [B, S, H, D] of a tensor with unit stride.
Rows RowsOf(const Tensor& x, const std::vector<int64_t>& heads) {
    return {x.data_ptr(), x.stride(0), x.stride(1), heads.data()};
}
OutRows OutRowsOf(const Tensor& x, const std::vector<int64_t>& heads) {
    return {x.data_ptr(), x.stride(0), x.stride(1), heads.data()};
}

void CheckContiguous(const Tensor& x, ScalarType type, int64_t numel, const char* name) {
    STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == type && x.numel() == numel && x.is_contiguous(), name,
                    " does not fit");
}

const AttentionKernels& Choose(const LevelKernels& level, const Tensor& q) {
    const ScalarType type = q.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16,
                    "expanded_attention has kernels for float32 and bfloat16");
    return type == ScalarType::Float ? level.fp32 : level.bf16;
}

// What both faces and both directions share; sizes must have been set.
void Describe(Attention& work, const Tensor& seen, const Tensor& sample_keys, const Tensor& positions,
              int64_t first_head, int64_t threshold, double scale) {
    CheckContiguous(seen, ScalarType::Int, work.batch * work.queries * 3, "seen");
    CheckContiguous(sample_keys, ScalarType::Long, work.batch, "sample_keys");
    CheckContiguous(positions, ScalarType::Long, work.queries, "positions");
    STD_TORCH_CHECK(threshold >= 0 && threshold < 65536, "the threshold is not one of 65536 levels");
    STD_TORCH_CHECK(scale > 0.0, "the scale must be positive");
    work.seen = static_cast<const int32_t*>(seen.data_ptr());
    work.sample_keys = static_cast<const int64_t*>(sample_keys.data_ptr());
    work.positions = static_cast<const int64_t*>(positions.data_ptr());
    work.first_head = first_head;
    work.threshold = static_cast<uint32_t>(threshold);
    work.scale = static_cast<float>(scale);
    work.keep_scale = static_cast<float>(65536.0 / (65536.0 - static_cast<double>(threshold)));
}

// Runs the forward pass for a few kv heads at a time, so that their packed keys stay in a cache and the
// buffer is one that the allocator keeps.
void RunForward(const Attention& work, const AttentionKernels& kernels) {
    if (work.batch == 0 || work.queries == 0 || work.heads == 0 || work.dim == 0) return;
    const int64_t packed = kernels.packed(work), blocks = work.blocks(), pairs = work.batch * work.groups;
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t wave = std::min(pairs, std::max(threads, kPackedFloats / packed));
    const Buffer keys = Allocate(wave * packed);
    struct Head {
        int64_t sample, head, slot;
    };
    for (int64_t first = 0; first < pairs; first += wave) {
        const int64_t end = std::min(pairs, first + wave);
        std::vector<Head> heads;
        for (int64_t pair = first; pair < end; ++pair)
            for (int64_t head = 0; head < work.heads; ++head)
                if (work.kv_of[head] == pair % work.groups)
                    heads.push_back({pair / work.groups, head, pair - first});
        ForItems(end - first, 0, [&](int64_t slot, float*) {
            const int64_t pair = first + slot;
            kernels.pack(work, pair / work.groups, pair % work.groups, keys.get() + slot * packed);
        });
        const int64_t items = static_cast<int64_t>(heads.size()) * blocks;
        ForItems(items, kernels.forward_scratch(work), [&](int64_t item, float* scratch) {
            const Head& x = heads[item / blocks];
            kernels.forward(work, x.sample, x.head, item % blocks, keys.get() + x.slot * packed, scratch);
        });
    }
}

void RunBackward(const Attention& work, const AttentionKernels& kernels) {
    if (work.batch == 0 || work.dim == 0) return;
    ForItems(work.batch * work.groups, kernels.backward_scratch(work), [&](int64_t item, float* scratch) {
        kernels.backward(work, item / work.groups, item % work.groups, scratch);
    });
}

// Tensors of the separate face, kept alive with the offsets of their heads.
struct Separate {
    Tensor q, k, v;
    std::vector<int64_t> q_heads, k_heads, v_heads;
    Attention work{};

    Separate(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& kv_map)
        : q(UnitStride(q_)), k(UnitStride(k_)), v(UnitStride(v_)) {
        STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k and v must have four dims");
        STD_TORCH_CHECK(q.is_cpu() && k.is_cpu() && v.is_cpu(), "q, k and v must be on the CPU");
        STD_TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
                        "q, k and v must have one type");
        STD_TORCH_CHECK(Sizes(k) == Sizes(v) && q.size(0) == k.size(0) && q.size(3) == k.size(3),
                        "q, k and v do not fit");
        work.batch = q.size(0);
        work.queries = q.size(1);
        work.keys = k.size(1);
        work.heads = q.size(2);
        work.groups = k.size(2);
        work.dim = q.size(3);
        CheckContiguous(kv_map, ScalarType::Long, work.heads, "kv_map");
        work.kv_of = static_cast<const int64_t*>(kv_map.data_ptr());
        for (int64_t h = 0; h < work.heads; ++h)
            STD_TORCH_CHECK(work.kv_of[h] >= 0 && work.kv_of[h] < work.groups, "kv_map names no head");
        q_heads = Heads(work.heads, q.stride(2));
        k_heads = Heads(work.groups, k.stride(2));
        v_heads = Heads(work.groups, v.stride(2));
        work.q = RowsOf(q, q_heads);
        work.k = RowsOf(k, k_heads);
        work.v = RowsOf(v, v_heads);
    }
};

// The same of a fused projection.
struct Packed {
    Tensor qkv;
    std::vector<int64_t> heads, key_heads, value_heads, kv_of;
    Attention work{};

    explicit Packed(const Tensor& qkv_) : qkv(UnitStride(qkv_)) {
        STD_TORCH_CHECK(qkv.dim() == 5 && qkv.is_cpu() && qkv.size(3) > 2,
                        "qkv must be [B, S, G, H / G + 2, D]");
        const int64_t queries = qkv.size(3) - 2;
        work.batch = qkv.size(0);
        work.queries = work.keys = qkv.size(1);
        work.groups = qkv.size(2);
        work.heads = work.groups * queries;
        work.dim = qkv.size(4);
        Offsets(qkv, heads, key_heads, value_heads);
        for (int64_t h = 0; h < work.heads; ++h) kv_of.push_back(h / queries);
        work.kv_of = kv_of.data();
        work.q = RowsOf(qkv, heads);
        work.k = RowsOf(qkv, key_heads);
        work.v = RowsOf(qkv, value_heads);
    }

    static void Offsets(const Tensor& x, std::vector<int64_t>& heads, std::vector<int64_t>& key_heads,
                        std::vector<int64_t>& value_heads) {
        const int64_t queries = x.size(3) - 2;
        for (int64_t g = 0; g < x.size(2); ++g) {
            const int64_t group = g * x.stride(2);
            for (int64_t j = 0; j < queries; ++j) heads.push_back(group + j * x.stride(3));
            key_heads.push_back(group + queries * x.stride(3));
            value_heads.push_back(group + (queries + 1) * x.stride(3));
        }
    }
};

std::tuple<Tensor, Tensor> Forward(Attention& work, const Tensor& like) {
    const LevelKernels level = Level();
    const AttentionKernels& kernels = Choose(level, like);
    const Tensor out = EmptyLike(like, {work.batch, work.queries, work.heads, work.dim}, like.scalar_type());
    const Tensor lse = EmptyLike(like, {work.batch, work.heads, work.queries}, ScalarType::Float);
    const std::vector<int64_t> heads = Heads(work.heads, work.dim);
    work.out = OutRowsOf(out, heads);
    work.lse = static_cast<float*>(lse.data_ptr());
    RunForward(work, kernels);
    return {out, lse};
}

// Runs the backward pass; where its results go has been said.
void Backward(Attention& work, const Tensor& like, const Tensor& grad_,
              const std::optional<Tensor>& grad_lse_, const Tensor& out_, const Tensor& lse) {
    const LevelKernels level = Level();
    const AttentionKernels& kernels = Choose(level, like);
    const Tensor grad = UnitStride(grad_), out = UnitStride(out_);
    const std::vector<int64_t> expected{work.batch, work.queries, work.heads, work.dim};
    STD_TORCH_CHECK(grad.is_cpu() && Sizes(grad) == expected && grad.scalar_type() == like.scalar_type(),
                    "grad does not fit");
    STD_TORCH_CHECK(out.is_cpu() && Sizes(out) == expected && out.scalar_type() == like.scalar_type(),
                    "out does not fit");
    const std::vector<int64_t> grad_heads = Heads(work.heads, grad.stride(2));
    const std::vector<int64_t> out_heads = Heads(work.heads, out.stride(2));
    work.grad = RowsOf(grad, grad_heads);
    work.mixed = RowsOf(out, out_heads);
    const int64_t rows = work.batch * work.heads * work.queries;
    CheckContiguous(lse, ScalarType::Float, rows, "lse");
    work.lse = static_cast<float*>(lse.data_ptr());
    std::optional<Tensor> grad_lse;
    if (grad_lse_) {
        grad_lse = torch::stable::contiguous(*grad_lse_);
        CheckContiguous(*grad_lse, ScalarType::Float, rows, "grad_lse");
        work.grad_lse = static_cast<const float*>(grad_lse->data_ptr());
    }
    RunBackward(work, kernels);
}

}  // namespace

std::tuple<Tensor, Tensor> AttentionForward(Tensor q, Tensor k, Tensor v, Tensor kv_map, Tensor seen,
                                            Tensor sample_keys, Tensor positions, int64_t first_head,
                                            int64_t threshold, double scale) {
    Separate call(q, k, v, kv_map);
    Describe(call.work, seen, sample_keys, positions, first_head, threshold, scale);
    return Forward(call.work, call.q);
}

std::tuple<Tensor, Tensor, Tensor> AttentionBackward(Tensor grad, std::optional<Tensor> grad_lse, Tensor q,
                                                     Tensor k, Tensor v, Tensor out, Tensor lse,
                                                     Tensor kv_map, Tensor seen, Tensor sample_keys,
                                                     Tensor positions, int64_t first_head, int64_t threshold,
                                                     double scale) {
    Separate call(q, k, v, kv_map);
    Attention& work = call.work;
    Describe(work, seen, sample_keys, positions, first_head, threshold, scale);
    const Tensor dq = EmptyLike(q, Sizes(q), q.scalar_type());
    const Tensor dk = EmptyLike(k, Sizes(k), k.scalar_type());
    const Tensor dv = EmptyLike(v, Sizes(v), v.scalar_type());
    const std::vector<int64_t> q_heads = Heads(work.heads, work.dim), k_heads = Heads(work.groups, work.dim);
    work.dq = OutRowsOf(dq, q_heads);
    work.dk = OutRowsOf(dk, k_heads);
    work.dv = OutRowsOf(dv, k_heads);
    Backward(work, call.q, grad, grad_lse, out, lse);
    return {dq, dk, dv};
}

std::tuple<Tensor, Tensor> PackedForward(Tensor qkv, Tensor seen, Tensor sample_keys, Tensor positions,
                                         int64_t first_head, int64_t threshold, double scale) {
    Packed call(qkv);
    Describe(call.work, seen, sample_keys, positions, first_head, threshold, scale);
    return Forward(call.work, call.qkv);
}

Tensor PackedBackward(Tensor grad, std::optional<Tensor> grad_lse, Tensor qkv, Tensor out, Tensor lse,
                      Tensor seen, Tensor sample_keys, Tensor positions, int64_t first_head,
                      int64_t threshold, double scale) {
    Packed call(qkv);
    Attention& work = call.work;
    Describe(work, seen, sample_keys, positions, first_head, threshold, scale);
    const Tensor gradient = EmptyLike(qkv, Sizes(qkv), qkv.scalar_type());
    std::vector<int64_t> heads, key_heads, value_heads;
    Packed::Offsets(gradient, heads, key_heads, value_heads);
    work.dq = OutRowsOf(gradient, heads);
    work.dk = OutRowsOf(gradient, key_heads);
    work.dv = OutRowsOf(gradient, value_heads);
    Backward(work, call.qkv, grad, grad_lse, out, lse);
    return gradient;
}

}  // namespace elle_mp
