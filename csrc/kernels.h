// Every launcher of the module. Pointers are of the device (of the host, in the host build), sizes
// in elements; each returns a CUDA status, 0 for success, and waits for nothing.
#pragma once

#include <cstdint>

namespace reap {

// Statuses that launchers answer with themselves, as CUDA numbers them.
constexpr int SUCCESS = 0;
constexpr int INVALID_VALUE = 1;  // cudaErrorInvalidValue: the caller passed what no kernel takes

// Of elements; module.cpp gives Python the same numbers by torch's names.
enum class Dtype : int { bf16, fp16, fp32, fp64, int32, int64 };

// Where a launch goes: a device's number, and a stream's handle.
struct Where {
    int device;
    std::uintptr_t stream;
};

// Slots of one warp of `sort_slots`: its scratch has ceil(slots / SORT_CHUNK) rows.
constexpr std::int64_t SORT_CHUNK = 256;
// Most experts `sort_slots` takes: their counters lie in shared memory.
constexpr int SORT_EXPERTS = 4095;
// Most slots per token that `combine_rows` takes: their norms lie in registers.
constexpr int COMBINE_SLOTS = 32;

// Sorts slots by expert, stably; see sort.cu for the arrays.
struct Sort {
    const void* ids;
    int ids_dtype;
    const void* topk_weights;  // or null
    int topk_weights_dtype;
    std::int64_t slots;
    int experts;
    std::int32_t* counts;
    std::int32_t* totals;
    std::int64_t* offsets;
    std::int64_t* gather_index;
    std::int64_t* scatter_index;
};
int sort_slots(const Sort& call, Where where);

// Lists the tiles of `block_m` sorted rows of each expert.
struct Schedule {
    const std::int64_t* offsets;
    int experts;
    int block_m;
    std::int32_t* tile_experts;
    std::int32_t* tile_rows;
    std::int32_t* firsts;
};
int schedule_tiles(const Schedule& call, Where where);

// Reads every row of y once: weighted sums, norms, extrema; see combine.cu for the arrays.
struct Combine {
    const void* y;
    int y_dtype;
    const void* router_weights;
    int router_weights_dtype;
    const std::int64_t* scatter_index;  // or null: every row of y is a slot of its own
    const std::int64_t* offsets;
    void* out;      // or null
    int out_dtype;  // y's
    float* norm;    // or null, as are high and low then
    float* high;
    float* low;
    std::int64_t tokens;
    int top_k;
    int experts;
    std::int64_t hidden;
    bool wide;  // whether rows of y and out begin at multiples of 16 bytes
};
int combine_rows(const Combine& call, Where where);

// Numbers that a tile of `reduce_slots` sums up.
constexpr int REDUCE_FIELDS = 9;

// Adds measured slots to the statistics; see reduce.cu for the arrays.
struct Reduce {
    const float* norm;
    const float* high;
    const float* low;
    const void* router_weights;
    int router_weights_dtype;
    const std::int64_t* gather_index;
    const std::int64_t* offsets;
    const std::int32_t* tile_experts;
    const std::int32_t* tile_rows;
    const std::int32_t* firsts;
    const bool* mask;           // or null
    const std::int64_t* group;  // or null: all are of group `first_group`
    double* partials;
    std::int64_t* counts;
    double* sums;
    float* extrema;
    std::int64_t max_tiles;
    int block_m;
    int experts;
    int top_k;
    int groups;  // of the statistics
    int first_group;
};
int reduce_slots(const Reduce& call, Where where);

// Dequantizes experts to bf16; see dequant.cu for the formats and arrays.
struct Dequant {
    const void* values;
    const void* scales;
    int scales_dtype;             // where a format has several
    const std::int64_t* offsets;  // or null; experts without rows are skipped
    void* out;                    // at a multiple of 16 bytes
    int experts;
    std::int64_t rows;
    std::int64_t columns;
    int block_rows;     // that share a scale: powers of two for E4M3, else 1
    int block_columns;  // likewise; 32 for MXFP4, a multiple of 8 for integers
};
int dequantize_fp8(const Dequant& call, Where where);
int dequantize_mxfp4(const Dequant& call, Where where);
int dequantize_int4(const Dequant& call, Where where);

// What a product computes of its sums; `Activation` states the formulas of those with a gate.
enum class Formula : int {
    none,
    relu2,
    silu,
    gelu_tanh,
    silu_clamped_in,
    silu_clamped_out,
    swiglu_oai
};

// Sorted rows of a tile of `multiply_experts`: `block_m` of its tile list.
constexpr int PRODUCT_ROWS = 256;

// One matrix [N, K] per expert, K contiguous; gated, two of the same shape and strides.
struct Matrices {
    const void* up;    // expert 0's; or null: `table` describes all
    const void* gate;  // likewise, or null: not gated
    std::int64_t expert_stride;
    std::int64_t row_stride;
    const void* table;  // on the device, of `describe_experts`; or null
};

// [E, N] of the matrices' dtype, with free strides.
struct Biases {
    const void* base;  // or null: none
    std::int64_t expert_stride;
    std::int64_t row_stride;
};

// One grouped product on sm_90, with its activation; see grouped.cuh for the arrays. It needs no
// memory beside its output and the tile list. Addresses of tokens, matrices and out, and strides of
// tokens and matrices, are multiples of 16 bytes, N and K of 8 elements.
struct Product {
    int dtype;  // bf16 or fp16
    int formula;
    float limit;  // infinity where the formula has none
    float alpha;
    const void* tokens;
    std::int64_t token_rows;
    std::int64_t token_stride;
    const std::int64_t* gather_index;  // or null: tokens are sorted rows
    int top_k;                         // of gather_index
    Matrices matrices;
    Biases bias;       // of the ups
    Biases gate_bias;  // of the gates
    const std::int64_t* offsets;
    const std::int32_t* tile_experts;
    const std::int32_t* tile_rows;
    const std::int32_t* firsts;
    void* out;
    std::int64_t slots;
    int experts;
    int width;  // N
    int depth;  // K
    int group;  // tiles that use a weight tile before the next; at least 1
};
int multiply_experts(const Product& call, Where where);

// Describes experts whose matrices are separate tensors, in host memory; the caller copies the
// result to the device, at a multiple of 128 bytes.
struct Table {
    int dtype;
    const std::uint64_t* ups;    // [E] addresses
    const std::uint64_t* gates;  // likewise, or null
    std::int64_t row_stride;
    int experts;
    int width;
    int depth;
    void* table;  // [table_bytes(experts)]
    int device;   // that will read it
};
constexpr std::int64_t table_bytes(int experts) { return std::int64_t{132} * experts; }
int describe_experts(const Table& call);

// The weights of one product of a layer, as `Product` has them.
struct Weights {
    Matrices matrices;
    Biases bias;
    Biases gate_bias;
};

// An MoE layer by the kernels above alone, in one call: sort, tiles, both products, combination and
// reduction, one after another on the stream, in one workspace; see layer.cpp for its arrays.
struct Layer {
    const void* hidden;  // [T, H], contiguous
    int dtype;           // bf16 or fp16, of all weights and of `out`
    const void* ids;     // [T, k], as are the router weights
    int ids_dtype;
    const void* router_weights;
    int router_weights_dtype;
    std::int64_t tokens;
    int top_k;
    int experts;
    int width;  // H
    int inner;  // I
    int formula;
    float limit;
    float alpha;
    int tiles;  // of rows that use a tile of weights before the next: `Product::group`
    Weights first;
    Weights second;
    void* out;   // [T, H]
    int groups;  // of the statistics; 0: none are kept. What follows is as in `Reduce`.
    std::int64_t* counts;
    double* sums;
    float* extrema;
    const bool* mask;
    const std::int64_t* group;
    int first_group;
    void* workspace;  // of `layer_bytes`, at a multiple of 256 bytes
};
int run_layer(const Layer& call, Where where);

// Bytes of workspace that `run_layer` needs, by tokens, top_k, experts, width, inner and groups.
std::int64_t layer_bytes(const Layer& call);

}  // namespace reap
