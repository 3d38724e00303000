// One call per layer: launches every kernel of an observed MoE layer from one workspace.
//
// Arrays of the workspace, each at a multiple of 256 bytes, with S = T * k slots, C chunks of
// SORT_CHUNK slots and M tiles of PRODUCT_ROWS sorted rows:
//
//   offsets         [E + 1] int64         first sorted row of each expert
//   gather_index    [S] int64             slot of each sorted row
//   scatter_index   [S] int64             sorted row of each slot
//   counts          [C, E + 1] int32      of `sort_slots`
//   totals          [E + 1] int32         of `sort_slots`
//   tile_experts    [M] int32             expert of each tile
//   tile_rows       [M] int32             first sorted row of each tile
//   firsts          [E + 1] int32         first tile of each expert
//   h               [S, I]                results of the first product, by sorted row
//   y               [S, H]                results of the second
//   norm, high, low [S] float32           of each slot, where statistics are kept
//   partials        [fields, G, M] double of each tile, likewise
#include <initializer_list>

#include "kernels.h"

namespace reap {
namespace {

constexpr std::int64_t ALIGNED = 256;
constexpr std::int64_t ELEMENT = 2;  // bytes of bf16 and fp16

std::int64_t slots_of(const Layer& call) { return call.tokens * call.top_k; }

// Most tiles there can be: an expert's last tile may be partly empty.
std::int64_t most_tiles(const Layer& call) {
    const std::int64_t slots = slots_of(call);
    return slots / PRODUCT_ROWS + (call.experts < slots ? call.experts : slots);
}

// Addresses of the arrays; from a null base, their offsets.
struct Workspace {
    std::int64_t* offsets;
    std::int64_t* gather_index;
    std::int64_t* scatter_index;
    std::int32_t* counts;
    std::int32_t* totals;
    std::int32_t* tile_experts;
    std::int32_t* tile_rows;
    std::int32_t* firsts;
    void* h;
    void* y;
    float* norm = nullptr;
    float* high = nullptr;
    float* low = nullptr;
    double* partials = nullptr;
    std::int64_t bytes = 0;

    explicit Workspace(const Layer& call) {
        base_ = reinterpret_cast<std::uintptr_t>(call.workspace);
        const std::int64_t slots = slots_of(call), bins = call.experts + 1;
        const std::int64_t chunks = (slots + SORT_CHUNK - 1) / SORT_CHUNK;
        const std::int64_t tiles = most_tiles(call);
        offsets = take<std::int64_t>(bins);
        gather_index = take<std::int64_t>(slots);
        scatter_index = take<std::int64_t>(slots);
        counts = take<std::int32_t>(chunks * bins);
        totals = take<std::int32_t>(bins);
        tile_experts = take<std::int32_t>(tiles);
        tile_rows = take<std::int32_t>(tiles);
        firsts = take<std::int32_t>(bins);
        h = take<char>(slots * call.inner * ELEMENT);
        y = take<char>(slots * call.width * ELEMENT);
        if (call.groups == 0) return;
        norm = take<float>(slots);
        high = take<float>(slots);
        low = take<float>(slots);
        partials = take<double>(REDUCE_FIELDS * tiles * call.groups);
    }

  private:
    std::uintptr_t base_;

    template <class T>
    T* take(std::int64_t count) {
        T* const found = reinterpret_cast<T*>(base_ + static_cast<std::uintptr_t>(bytes));
        const std::int64_t size = count * static_cast<std::int64_t>(sizeof(T));
        bytes += (size + ALIGNED - 1) / ALIGNED * ALIGNED;
        return found;
    }
};

// What both products have in common.
Product product_of(const Layer& call, const Weights& weights, const Workspace& own) {
    Product to{};
    to.dtype = call.dtype;
    to.top_k = call.top_k;
    to.matrices = weights.matrices;
    to.bias = weights.bias;
    to.gate_bias = weights.gate_bias;
    to.offsets = own.offsets;
    to.tile_experts = own.tile_experts;
    to.tile_rows = own.tile_rows;
    to.firsts = own.firsts;
    to.slots = slots_of(call);
    to.experts = call.experts;
    to.group = call.tiles;
    return to;
}

// h of the tokens, by sorted row.
int first_product(const Layer& call, const Workspace& own, Where where) {
    Product to = product_of(call, call.first, own);
    to.formula = call.formula;
    to.limit = call.limit;
    to.alpha = call.alpha;
    to.tokens = call.hidden;
    to.token_rows = call.tokens;
    to.token_stride = call.width;
    to.gather_index = own.gather_index;
    to.out = own.h;
    to.width = call.inner;
    to.depth = call.width;
    return multiply_experts(to, where);
}

// y of h.
int second_product(const Layer& call, const Workspace& own, Where where) {
    Product to = product_of(call, call.second, own);
    to.formula = static_cast<int>(Formula::none);
    to.tokens = own.h;
    to.token_rows = slots_of(call);
    to.token_stride = call.inner;
    to.out = own.y;
    to.width = call.width;
    to.depth = call.inner;
    return multiply_experts(to, where);
}

int sort(const Layer& call, const Workspace& own, Where where) {
    const int status = sort_slots(
        {call.ids, call.ids_dtype, call.router_weights, call.router_weights_dtype, slots_of(call),
         call.experts, own.counts, own.totals, own.offsets, own.gather_index, own.scatter_index},
        where);
    if (status != SUCCESS) return status;
    return schedule_tiles(
        {own.offsets, call.experts, PRODUCT_ROWS, own.tile_experts, own.tile_rows, own.firsts},
        where);
}

int combine(const Layer& call, const Workspace& own, Where where) {
    // Rows of y begin at multiples of 16 bytes, since products take no other widths.
    const bool wide = reinterpret_cast<std::uintptr_t>(call.out) % 16 == 0;
    return combine_rows({own.y, call.dtype, call.router_weights, call.router_weights_dtype,
                         own.scatter_index, own.offsets, call.out, call.dtype, own.norm, own.high,
                         own.low, call.tokens, call.top_k, call.experts, call.width, wide},
                        where);
}

int reduce(const Layer& call, const Workspace& own, Where where) {
    return reduce_slots({own.norm,
                         own.high,
                         own.low,
                         call.router_weights,
                         call.router_weights_dtype,
                         own.gather_index,
                         own.offsets,
                         own.tile_experts,
                         own.tile_rows,
                         own.firsts,
                         call.mask,
                         call.group,
                         own.partials,
                         call.counts,
                         call.sums,
                         call.extrema,
                         most_tiles(call),
                         PRODUCT_ROWS,
                         call.experts,
                         call.top_k,
                         call.groups,
                         call.first_group},
                        where);
}

}  // namespace

std::int64_t layer_bytes(const Layer& call) { return Workspace(call).bytes; }

int run_layer(const Layer& call, Where where) {
    if (call.tokens == 0) return SUCCESS;
    if (call.tokens < 0 || call.top_k < 1 || call.groups < 0 ||
        reinterpret_cast<std::uintptr_t>(call.workspace) % ALIGNED)
        return INVALID_VALUE;
    const Workspace own(call);
    for (const auto stage : {sort, first_product, second_product, combine}) {
        const int status = stage(call, own, where);
        if (status != SUCCESS) return status;
    }
    return call.groups ? reduce(call, own, where) : SUCCESS;
}

}  // namespace reap
