// Every launcher of the module. Pointers are of the device (of the host, in the host build), sizes
// in elements; each returns a CUDA status, 0 for success, and waits for nothing.
#pragma once

#include <cstdint>

namespace reap {

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

}  // namespace reap
