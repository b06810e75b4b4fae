// The hidden states in front of the first layer: rows of the tables of tokens, prompts and positions, their
// norm and its dropout.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace elle_mp {

using torch::stable::Tensor;

// table [V, D], prompt_table [domains, P, D], position_table [L, D], all contiguous and of one type, fp32 or
// bf16; weight and bias [D] of the norm, if there is one; ids int64 [B, T]; at int64 [R], the positions of
// the R rows of a sequence, those below P first, R - T of them; domains int64 [B]; stat_weights [D]; keys [B]
// where the threshold is not 0. -> y [B, R, D], and statistics as of AddNorm (empty without a norm).
std::tuple<Tensor, Tensor> PromptEmbedding(Tensor table, std::optional<Tensor> prompt_table,
                                           std::optional<Tensor> position_table, std::optional<Tensor> weight,
                                           std::optional<Tensor> bias, Tensor ids, Tensor at,
                                           std::optional<Tensor> domains, std::optional<Tensor> stat_weights,
                                           std::optional<Tensor> keys, int64_t start, int64_t threshold,
                                           double eps);
// -> gradients of table, prompt_table, position_table (empty where there is none), and of weight and bias,
// fp32 [2, D].
std::tuple<Tensor, Tensor, Tensor, Tensor> PromptEmbeddingBackward(
    Tensor dy, std::optional<Tensor> statistics, Tensor table, std::optional<Tensor> prompt_table,
    std::optional<Tensor> position_table, std::optional<Tensor> weight, Tensor ids, Tensor at,
    std::optional<Tensor> domains, std::optional<Tensor> stat_weights, std::optional<Tensor> keys,
    int64_t start, int64_t threshold);

}  // namespace elle_mp
