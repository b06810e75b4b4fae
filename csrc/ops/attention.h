// The faces of attention that library.cpp registers.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace elle_mp {

using torch::stable::Tensor;

// q [B, Sq, H, D], k and v [B, T, G, D] -> out [B, Sq, H, D] contiguous, lse fp32 [B, H, Sq].
std::tuple<Tensor, Tensor> AttentionForward(Tensor q, Tensor k, Tensor v, Tensor kv_map, Tensor seen,
                                            Tensor sample_keys, Tensor positions, int64_t first_head,
                                            int64_t threshold, double scale);
// -> dq, dk, dv, contiguous.
std::tuple<Tensor, Tensor, Tensor> AttentionBackward(Tensor grad, std::optional<Tensor> grad_lse, Tensor q,
                                                     Tensor k, Tensor v, Tensor out, Tensor lse,
                                                     Tensor kv_map, Tensor seen, Tensor sample_keys,
                                                     Tensor positions, int64_t first_head, int64_t threshold,
                                                     double scale);
// The same of a fused projection qkv [B, S, G, H / G + 2, D]: of each group the queries, then its key, its
// value.
std::tuple<Tensor, Tensor> PackedForward(Tensor qkv, Tensor seen, Tensor sample_keys, Tensor positions,
                                         int64_t first_head, int64_t threshold, double scale);
// -> dqkv, contiguous.
Tensor PackedBackward(Tensor grad, std::optional<Tensor> grad_lse, Tensor qkv, Tensor out, Tensor lse,
                      Tensor seen, Tensor sample_keys, Tensor positions, int64_t first_head,
                      int64_t threshold, double scale);

}  // namespace elle_mp
