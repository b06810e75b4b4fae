// The host side of attention: what a call's tensors say, checked.
#pragma once

#include <algorithm>

#include "attention.h"
#include "binding.h"

namespace elle_mp {

inline Tensor UnitStride(const Tensor& x) {
    return x.numel() == 0 || x.size(x.dim() - 1) == 1 || x.stride(x.dim() - 1) == 1
               ? x
               : torch::stable::contiguous(x);
}

// Rows [B, S, H, D] of a tensor whose head h is `offset` elements and h / heads_in_group groups and h %
// heads_in_group heads behind its start.
inline HeadRows RowsAt(const Tensor& x, int64_t offset, int64_t group, int64_t head, int64_t heads_in_group) {
    const int64_t dim = x.size(x.dim() - 1);
    HeadRows rows{};
    rows.data = static_cast<uint16_t*>(x.data_ptr()) + offset;
    rows.batch = x.stride(0);
    rows.row = x.stride(1);
    rows.group = group;
    rows.head = head;
    rows.heads_in_group = static_cast<int>(heads_in_group);
    rows.aligned = reinterpret_cast<std::uintptr_t>(rows.data) % 16 == 0 &&
                   (rows.batch | rows.row | group | head | dim) % 8 == 0;
    return rows;
}

inline HeadRows RowsOf(const Tensor& x) { return RowsAt(x, 0, x.stride(2), 0, 1); }

// The parts of a fused projection [B, S, G, H / G + 2, D].
struct PackedRows {
    HeadRows q, k, v;

    explicit PackedRows(const Tensor& qkv) {
        const int64_t queries = qkv.size(3) - 2, group = qkv.stride(2), slot = qkv.stride(3);
        q = RowsAt(qkv, 0, group, slot, queries);
        k = RowsAt(qkv, queries * slot, group, 0, 1);
        v = RowsAt(qkv, (queries + 1) * slot, group, 0, 1);
    }
};

inline void CheckHalf(const Tensor& x) {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half,
                    "expanded_attention has CUDA kernels for bfloat16 and float16");
}

// A call, with the tensors that it reads kept alive.
class AttentionCall {
  public:
    Attention work{};
    Device device;

    // kv_map lies on the CPU: its heads are checked, and go to the kernels by value.
    AttentionCall(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& kv_map)
        : device(q), q_(q) {
        STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k and v must have four dims");
        STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type() &&
                            k.is_cpu() == q.is_cpu() && v.is_cpu() == q.is_cpu(),
                        "q, k and v must have one type and device");
        STD_TORCH_CHECK(SizesOf(k) == SizesOf(v) && q.size(0) == k.size(0) && q.size(3) == k.size(3),
                        "q, k and v do not fit");
        SetSizes(q.size(0), q.size(1), k.size(1), q.size(2), k.size(2), q.size(3));
        STD_TORCH_CHECK(kv_map.is_cpu() && kv_map.scalar_type() == ScalarType::Long &&
                            kv_map.numel() == work.heads && kv_map.is_contiguous(),
                        "kv_map does not fit");
        for (int h = 0; h < work.heads; ++h) {
            const int64_t kv = DataOf<const int64_t>(kv_map)[h];
            STD_TORCH_CHECK(kv >= 0 && kv < work.groups, "kv_map names no head");
            work.kv_of[h] = static_cast<uint16_t>(kv);
        }
        work.q = RowsOf(Keep(q));
        work.k = RowsOf(Keep(k));
        work.v = RowsOf(Keep(v));
    }

    explicit AttentionCall(const Tensor& qkv) : device(qkv), q_(qkv) {
        STD_TORCH_CHECK(qkv.dim() == 5 && qkv.size(3) > 2, "qkv must be [B, S, G, H / G + 2, D]");
        const int64_t queries = qkv.size(3) - 2;
        SetSizes(qkv.size(0), qkv.size(1), qkv.size(1), qkv.size(2) * queries, qkv.size(2), qkv.size(4));
        for (int h = 0; h < work.heads; ++h) work.kv_of[h] = static_cast<uint16_t>(h / queries);
        const PackedRows rows(Keep(qkv));
        work.q = rows.q;
        work.k = rows.k;
        work.v = rows.v;
    }

    void Describe(const Tensor& seen, const Tensor& sample_keys, const Tensor& positions, int64_t first_head,
                  int64_t threshold, double scale) {
        CheckFits(seen, q_, ScalarType::Int, static_cast<int64_t>(work.batch) * work.queries * 3, "seen");
        CheckFits(sample_keys, q_, ScalarType::Long, work.batch, "sample_keys");
        CheckFits(positions, q_, ScalarType::Long, work.queries, "positions");
        STD_TORCH_CHECK(threshold >= 0 && threshold < 65536, "the threshold is not one of 65536 levels");
        STD_TORCH_CHECK(scale > 0.0, "the scale must be positive");
        work.seen = DataOf<const int32_t>(seen);
        work.sample_keys = DataOf<const int64_t>(sample_keys);
        work.positions = DataOf<const int64_t>(positions);
        work.first_head = first_head;
        work.threshold = static_cast<uint32_t>(threshold);
        work.scale = static_cast<float>(scale);
        work.keep_scale = static_cast<float>(65536.0 / (65536.0 - static_cast<double>(threshold)));
    }

    // Room for the summaries, which the kernels of both directions begin with.
    void MakeRoom() {
        work.summaries = Scratch<Summary>(static_cast<int64_t>(work.batch) * TilesOf(work.queries));
    }

    bool empty() const { return work.batch == 0 || work.queries == 0 || work.heads == 0 || work.dim == 0; }

    // What it reads, with unit stride; lives as long as the call.
    const Tensor& Keep(const Tensor& x) {
        kept_.push_back(UnitStride(x));
        return kept_.back();
    }

    // A tensor that only the kernels of this call use.
    template <typename T>
    T* Scratch(int64_t count) {
        const int64_t words = count * static_cast<int64_t>(sizeof(T)) / 4;
        kept_.push_back(EmptyOf(q_, {words}, ScalarType::Int));
        return static_cast<T*>(kept_.back().data_ptr());
    }

    Element type() const { return ElementOf(q_, "expanded_attention"); }

  private:
    void SetSizes(int64_t batch, int64_t queries, int64_t keys, int64_t heads, int64_t groups, int64_t dim) {
        CheckHalf(q_);
        STD_TORCH_CHECK(dim <= 128, "expanded_attention has CUDA kernels for heads of up to 128 elements");
        STD_TORCH_CHECK(heads <= kMostHeads && groups <= kMostHeads, "more than 1024 heads");
        STD_TORCH_CHECK(std::max({batch, heads, groups}) <= 65535 && std::max(queries, keys) < (1 << 30),
                        "too large for one kernel");
        work.batch = static_cast<int>(batch);
        work.queries = static_cast<int>(queries);
        work.keys = static_cast<int>(keys);
        work.heads = static_cast<int>(heads);
        work.groups = static_cast<int>(groups);
        work.dim = static_cast<int>(dim);
    }

    Tensor q_;
    std::vector<Tensor> kept_;
};

}  // namespace elle_mp
