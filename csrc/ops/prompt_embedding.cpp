#include "prompt_embedding.h"

#include <atomic>
#include <numeric>

#include "levels.h"
#include "rows.h"

namespace elle_mp {
namespace {

// Rows of a table's gradient that a thread takes at a time.
constexpr int64_t kTableRows = 128;

const int64_t* Indices(const Tensor& x, int64_t count, const char* name) {
    STD_TORCH_CHECK(
        x.is_cpu() && x.scalar_type() == ScalarType::Long && x.numel() == count && x.is_contiguous(), name,
        " does not fit");
    return static_cast<const int64_t*>(x.data_ptr());
}

const void* Table(const Tensor& x, const Tensor& like, int64_t dims, const char* name) {
    STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == like.scalar_type() && x.dim() == dims &&
                        x.is_contiguous() && x.size(dims - 1) == like.size(1),
                    name, " does not fit");
    return x.data_ptr();
}

// What both directions share.
struct Call {
    std::vector<float> weight, bias, stat_weights, zeros;
    EmbeddingRows work{};
    EmbeddingKernels kernels{};
    int64_t batch, rows;

    Call(const Tensor& table, const std::optional<Tensor>& prompt_table,
         const std::optional<Tensor>& position_table, const std::optional<Tensor>& weight_,
         const std::optional<Tensor>& bias_, const Tensor& ids, const Tensor& at,
         const std::optional<Tensor>& domains, const std::optional<Tensor>& stat_weights_,
         const std::optional<Tensor>& keys, int64_t start, int64_t threshold, double eps) {
        STD_TORCH_CHECK(table.dim() == 2 && ids.dim() == 2,
                        "prompt_embedding wants a table [V, D] and ids [B, T]");
        const LevelKernels level = Level();
        kernels = IsFloat(table, "prompt_embedding") ? level.embedding_fp32 : level.embedding_bf16;
        work.table = Table(table, table, 2, "table");
        work.vocabulary = table.size(0);
        work.columns = table.size(1);
        work.start = start;
        work.length = at.numel();
        work.prompts = work.length - ids.size(1);
        batch = ids.size(0);
        rows = batch * work.length;
        work.ids = Indices(ids, ids.numel(), "ids");
        work.at = Indices(at, work.length, "at");
        zeros.assign(static_cast<std::size_t>(Padded(work.columns)), 0.0f);
        work.zeros = zeros.data();
        STD_TORCH_CHECK(work.prompts >= 0 && (work.prompts == 0 || prompt_table),
                        "prompt_embedding: at has other positions than ids and prompts");
        if (prompt_table) SetPrompts(*prompt_table, table, domains);
        if (position_table) {
            work.position_table = Table(*position_table, table, 2, "position_table");
            for (int64_t j = 0; j < work.length; ++j)
                STD_TORCH_CHECK(work.at[j] >= 0 && work.at[j] < position_table->size(0),
                                "prompt_embedding: position ", work.at[j], " of ", position_table->size(0));
        }
        work.normed = weight_.has_value();
        if (work.normed) SetNorm(*weight_, bias_, stat_weights_, eps);
        work.masks = Masks(keys, rows, 0, threshold);
        work.masks.positions = work.at;
        STD_TORCH_CHECK(threshold == 0 || keys->numel() == batch, "keys do not fit");
    }

    void SetPrompts(const Tensor& prompt_table, const Tensor& table, const std::optional<Tensor>& domains) {
        work.prompt_table = Table(prompt_table, table, 3, "prompt_table");
        work.prompt_tokens = prompt_table.size(1);
        STD_TORCH_CHECK(domains.has_value(), "prompts want domains");
        work.domains = Indices(*domains, batch, "domains");
        for (int64_t b = 0; b < batch; ++b)
            STD_TORCH_CHECK(work.domains[b] >= 0 && work.domains[b] < prompt_table.size(0),
                            "prompt_embedding: domain ", work.domains[b], " of ", prompt_table.size(0));
        for (int64_t j = 0; j < work.length; ++j)
            STD_TORCH_CHECK((work.at[j] >= 0 && work.at[j] < work.prompt_tokens) == (j < work.prompts),
                            "prompt_embedding: at has other positions than ids and prompts");
    }

    void SetNorm(const Tensor& weight_, const std::optional<Tensor>& bias_,
                 const std::optional<Tensor>& stat_weights_, double eps) {
        Norm& norm = work.norm;
        norm.columns = work.columns;
        weight = Floats(weight_, norm.columns, "weight");
        bias = bias_ ? Floats(*bias_, norm.columns, "bias") : std::vector<float>(weight.size(), 0.0f);
        if (stat_weights_) stat_weights = Floats(*stat_weights_, norm.columns, "stat_weights");
        norm.weight = weight.data();
        norm.bias = bias.data();
        norm.stat_weights = stat_weights_ ? stat_weights.data() : nullptr;
        norm.eps = static_cast<float>(eps);
    }

    void SetStatistics(const Tensor& statistics) {
        work.norm.mean = static_cast<float*>(statistics.data_ptr());
        work.norm.rstd = work.norm.mean + rows;
    }
};

// The gradient of a table of `entries` rows: each sums the rows of hidden states that were made of it, in
// their order. `entry_of` gives a row's, or -1.
template <typename F>
void SumByEntry(const EmbeddingKernels& kernels, const void* d_rows, int64_t rows, int64_t columns,
                int64_t entries, const F& entry_of, void* out, std::size_t row_bytes) {
    std::vector<int64_t> ends(static_cast<std::size_t>(entries + 1), 0),
        order(static_cast<std::size_t>(rows));
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t entry = entry_of(r);
        if (entry >= 0) ++ends[entry + 1];
    }
    std::partial_sum(ends.begin(), ends.end(), ends.begin());
    // A counting sort leaves in ends[e] where entry e ends, and entry e + 1 begins.
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t entry = entry_of(r);
        if (entry >= 0) order[ends[entry]++] = r;
    }
    const int64_t pieces = (entries + kTableRows - 1) / kTableRows;
    const int64_t threads = std::min<int64_t>(pieces, torch::stable::get_num_threads());
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
        std::vector<float> scratch(static_cast<std::size_t>(Padded(columns)));
        for (int64_t thread = begin; thread < end; ++thread)
            for (int64_t piece = next.fetch_add(1); piece < pieces; piece = next.fetch_add(1))
                for (int64_t e = piece * kTableRows; e < std::min(entries, (piece + 1) * kTableRows); ++e)
                    kernels.sum(d_rows, order.data(), e == 0 ? 0 : ends[e - 1], ends[e], columns,
                                scratch.data(),
                                static_cast<char*>(out) + static_cast<std::size_t>(e) * row_bytes);
    });
}

Tensor NewFloats(std::vector<int64_t> sizes, const Tensor& like) {
    return torch::stable::empty(sizes, ScalarType::Float, std::nullopt, like.device());
}

}  // namespace

std::tuple<Tensor, Tensor> PromptEmbedding(Tensor table, std::optional<Tensor> prompt_table,
                                           std::optional<Tensor> position_table, std::optional<Tensor> weight,
                                           std::optional<Tensor> bias, Tensor ids, Tensor at,
                                           std::optional<Tensor> domains, std::optional<Tensor> stat_weights,
                                           std::optional<Tensor> keys, int64_t start, int64_t threshold,
                                           double eps) {
    Call call(table, prompt_table, position_table, weight, bias, ids, at, domains, stat_weights, keys, start,
              threshold, eps);
    EmbeddingRows& work = call.work;
    const Tensor y = torch::stable::empty({call.batch, work.length, work.columns}, table.scalar_type(),
                                          std::nullopt, table.device());
    const Tensor statistics = NewFloats({2, work.normed ? call.rows : 0}, table);
    call.SetStatistics(statistics);
    work.y = y.data_ptr();
    torch::stable::parallel_for(0, call.rows, Grain(work.columns), [&](int64_t begin, int64_t end) {
        std::vector<float> scratch(static_cast<std::size_t>(Padded(work.columns)));
        call.kernels.forward(work, begin, end, scratch.data());
    });
    return {y, statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> PromptEmbeddingBackward(
    Tensor dy, std::optional<Tensor> statistics, Tensor table, std::optional<Tensor> prompt_table,
    std::optional<Tensor> position_table, std::optional<Tensor> weight, Tensor ids, Tensor at,
    std::optional<Tensor> domains, std::optional<Tensor> stat_weights, std::optional<Tensor> keys,
    int64_t start, int64_t threshold) {
    Call call(table, prompt_table, position_table, weight, std::nullopt, ids, at, domains, stat_weights, keys,
              start, threshold, 0.0);
    EmbeddingRows& work = call.work;
    STD_TORCH_CHECK(dy.is_cpu() && dy.scalar_type() == table.scalar_type() && dy.is_contiguous() &&
                        dy.numel() == call.rows * work.columns,
                    "dy does not fit");
    const bool changed = work.normed || threshold > 0;
    const Tensor d_rows = EmptyRows(dy, changed);
    const Tensor sums = NewFloats({2, work.normed ? work.columns : 0}, table);
    work.dy = dy.data_ptr();
    work.d_rows = d_rows.data_ptr();
    if (work.normed) {
        STD_TORCH_CHECK(statistics && statistics->is_cpu() &&
                            statistics->scalar_type() == ScalarType::Float &&
                            statistics->numel() == 2 * call.rows && statistics->is_contiguous(),
                        "statistics do not fit");
        call.SetStatistics(*statistics);
    }
    if (changed) {
        std::vector<float> both(static_cast<std::size_t>(2 * work.columns));
        const auto body = [&](int64_t begin, int64_t end, float* scratch, float* d_weight, float* d_bias) {
            call.kernels.backward(work, begin, end, scratch, d_weight, d_bias);
        };
        SumInBlocks(call.rows, work.columns, 2 * Padded(work.columns), body, both.data());
        if (work.normed) std::copy(both.begin(), both.end(), static_cast<float*>(sums.data_ptr()));
    }
    const void* rows = changed ? d_rows.data_ptr() : dy.data_ptr();
    const std::size_t row_bytes =
        static_cast<std::size_t>(work.columns) * (table.scalar_type() == ScalarType::Float ? 4 : 2);
    const auto gather = [&](const std::optional<Tensor>& of, int64_t entries, const auto& entry_of) {
        const Tensor out = of ? EmptyRows(*of, true) : EmptyRows(table, false);
        if (of)
            SumByEntry(call.kernels, rows, call.rows, work.columns, entries, entry_of, out.data_ptr(),
                       row_bytes);
        return out;
    };
    const Tensor d_table = gather(table, work.vocabulary, [&](int64_t row) {
        bool prompt = false;
        const int64_t entry = work.Entry(row, prompt);
        return prompt ? -1 : entry;
    });
    const Tensor d_prompts =
        gather(prompt_table, prompt_table ? prompt_table->size(0) * work.prompt_tokens : 0, [&](int64_t row) {
            bool prompt = false;
            const int64_t entry = work.Entry(row, prompt);
            return prompt ? entry : -1;
        });
    const Tensor d_positions = gather(position_table, position_table ? position_table->size(0) : 0,
                                      [&](int64_t row) { return work.at[row % work.length]; });
    return {d_table, d_prompts, d_positions, sums};
}

}  // namespace elle_mp
