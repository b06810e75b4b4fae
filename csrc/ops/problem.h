// What one call of attention is about; read by the kernels of every instruction level.
#pragma once

#include <cstdint>

namespace elle_mp {

// Queries of one block: the lanes of four AVX-512 registers.
constexpr int64_t kBlockQueries = 64;
// Queries, keys or columns that are computed or skipped together.
constexpr int64_t kGroup = 16;

// Rows [batch, row, head, dim] with unit stride in dim; strides and the heads' offsets in elements.
struct Rows {
    const void* data;
    int64_t batch, row;
    const int64_t* heads;
};

struct OutRows {
    void* data;
    int64_t batch, row;
    const int64_t* heads;
};

struct Attention {
    int64_t batch, queries, keys, heads, groups, dim;
    Rows q, k, v;
    // Query head h reads key and value head kv_of[h].
    const int64_t* kv_of;
    // [batch, queries, 3]: a query sees keys [0, x[0]) and [x[1], x[2]).
    const int32_t* seen;
    float scale;
    // Dropout: see counter.h of the helpers. No mask where the threshold is 0.
    uint32_t threshold;
    float keep_scale;
    const int64_t* sample_keys;
    const int64_t* positions;  // [queries]: row of the mask within a head
    int64_t first_head;
    // Both directions: [batch, heads, queries], natural logarithm; -inf where a query sees nothing.
    float* lse;
    OutRows out;  // forward

    // Backward.
    Rows mixed, grad;       // what the forward pass returned, and its gradient
    const float* grad_lse;  // as lse, or null
    OutRows dq, dk, dv;

    int64_t blocks() const { return (queries + kBlockQueries - 1) / kBlockQueries; }
};

// The kernels of one instruction level for one element type. Sizes in floats; buffers aligned to 64 bytes.
struct AttentionKernels {
    // Keys and values of one (sample, kv head), as Forward wants them.
    int64_t (*packed)(const Attention&);
    void (*pack)(const Attention&, int64_t sample, int64_t group, float* to);
    int64_t (*forward_scratch)(const Attention&);
    void (*forward)(const Attention&, int64_t sample, int64_t head, int64_t block, const float* packed,
                    float* scratch);
    // All heads that read one kv head, which is packed inside.
    int64_t (*backward_scratch)(const Attention&);
    void (*backward)(const Attention&, int64_t sample, int64_t group, float* scratch);
};

// Rows of logits [rows, columns], see cross_entropy.h.
struct Logits {
    void* logits;
    int64_t rows, columns, stride;
    const int64_t* targets;
    float* statistics;
    const float* lse;
    const float* factors;
    float hit, uniform;
};

struct CrossEntropyKernels {
    void (*statistics)(const Logits&, int64_t begin, int64_t end);
    void (*gradient)(const Logits&, int64_t begin, int64_t end);
};

// The masks of rows of hidden states, see counter.h of the helpers: row r is row first_row + r % run of the
// sequence keys[r / run], or row positions[r % run] where there are positions. None where the threshold is 0.
struct RowMasks {
    const int64_t* keys;
    const int64_t* positions;
    int64_t run, first_row;
    uint32_t threshold;
    float keep_scale;
};

// A norm of rows, see norms.h. What has one entry per column is padded to kGroup by zeros.
struct Norm {
    int64_t columns;
    const float *weight, *bias;
    const float* stat_weights;  // or null: all columns count alike
    float eps;
    bool rms;
    float *mean, *rstd;  // [rows]
};

// Rows [rows, columns], contiguous.
struct NormRows {
    Norm norm;
    RowMasks masks;
    const void *x, *residual;  // forward; no residual: null
    void *h, *y;               // forward; h is null where it is x
    // Backward.
    const void *kept, *dy, *dh;  // h, and the gradients of y and h; no gradient of h: null
    void *d_residual, *d_x;      // d_x is null where it is d_residual
};

struct NormKernels {
    // Rows begin to end; `scratch`: columns, padded to kGroup.
    void (*forward)(const NormRows&, int64_t begin, int64_t end, float* scratch);
    // Adds to d_weight and d_bias, padded likewise.
    void (*backward)(const NormRows&, int64_t begin, int64_t end, float* d_weight, float* d_bias);
};

// Rows of hidden states [batch, length, columns] made of tables, see prompt_embedding.h.
struct EmbeddingRows {
    Norm norm;
    bool normed;
    RowMasks masks;
    int64_t length, columns;
    // The first `prompts` rows of a sequence are those at[j] of its domain's [prompt_tokens, columns]; then
    // come those of its ids, zeros where an id is not in [start, start + vocabulary).
    const void *table, *prompt_table, *position_table;  // but for the first, null where there is none
    const int64_t *ids, *domains, *at;
    int64_t start, vocabulary, prompts, prompt_tokens;
    const void* zeros;  // a row of them
    void* y;            // forward
    // Backward: the gradients of y, and of the sums of rows.
    const void* dy;
    void* d_rows;

    // Row `row` of the sum is row `entry` of the prompt table or of the table, or zero where that is -1.
    int64_t Entry(int64_t row, bool& prompt) const {
        const int64_t sample = row / length, j = row % length;
        prompt = j < prompts;
        if (prompt) return domains[sample] * prompt_tokens + at[j];
        const int64_t id = ids[sample * (length - prompts) + j - prompts] - start;
        return id >= 0 && id < vocabulary ? id : -1;
    }
};

struct EmbeddingKernels {
    void (*forward)(const EmbeddingRows&, int64_t begin, int64_t end, float* scratch);
    // Adds to d_weight and d_bias where there is a norm; `scratch`: twice the columns, padded.
    void (*backward)(const EmbeddingRows&, int64_t begin, int64_t end, float* scratch, float* d_weight,
                     float* d_bias);
    // out [columns] = the sum of rows[order[i]], i from begin to end, made in fp32; `scratch`: columns,
    // padded.
    void (*sum)(const void* rows, const int64_t* order, int64_t begin, int64_t end, int64_t columns,
                float* scratch, void* out);
};

// Each level is compiled in a file of its own.
struct LevelKernels {
    AttentionKernels fp32, bf16;
    CrossEntropyKernels cross_entropy_fp32, cross_entropy_bf16;
    void (*normal_run)(uint64_t key, uint64_t start, int64_t count, float* out);  // see philox.h
    NormKernels norm_fp32, norm_bf16;
    EmbeddingKernels embedding_fp32, embedding_bf16;
};
LevelKernels PlainKernels();
#if defined(__x86_64__)
LevelKernels Avx2Kernels();
LevelKernels Avx512Kernels();
LevelKernels Avx512Bf16Kernels();
#endif

}  // namespace elle_mp
