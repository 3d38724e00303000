// Reduction of measured slots into the statistics of their experts, by fixed trees in float64.
//
// Arrays, with S slots, M tiles at most (see sort.cu for gather_index, offsets and tiles):
//
//   norm, high, low  [S] float32             by slot, from combine.cu
//   partials         [9, G, M] float64       one tile's rows of one group: 2 counts, 5 sums, 2
//                                            extrema, in the order of LayerStats
//   counts           [2, groups, E] int64    updated in place, as are the others
//   sums             [5, groups, E] float64
//   extrema          [2, groups, E] float32
//
// A tile's rows are of one expert, so a tile has one sum per field; an expert's tiles are
// consecutive.
#include "launch.cuh"
#include "types.cuh"
#include "warp.cuh"

namespace reap {
namespace {

constexpr int THREADS = 128;
constexpr int FIELDS = REDUCE_FIELDS, COUNTS = 2, SUMS = 5;

// What a field is of no rows at all.
REAP_DEVICE double nothing(int field) {
    if (field < COUNTS + SUMS) return 0;
    return field == COUNTS + SUMS ? -INFINITY : INFINITY;
}

// The fields of one row, or of many.
struct Fields {
    double at[FIELDS];

    REAP_DEVICE Fields() {
#pragma unroll
        for (int field = 0; field < FIELDS; ++field) at[field] = nothing(field);
    }

    REAP_DEVICE void add(double weight, float norm, float high, float low) {
        // NaN and Inf both fail this; such rows enter `nonfinite` and no sum.
        if (!(fabsf(norm) < INFINITY)) {
            at[1] += 1;
            return;
        }
        const double wide = norm, weighted = weight * wide;
        at[0] += 1;
        at[2] += weight;
        at[3] += wide;
        at[4] += weighted;
        at[5] += wide * wide;
        at[6] += weighted * weighted;
        at[7] = Max{}(at[7], static_cast<double>(high));
        at[8] = Min{}(at[8], static_cast<double>(low));
    }
};

REAP_DEVICE double combined(int field, double a, double b) {
    if (field < COUNTS + SUMS) return a + b;
    return field == COUNTS + SUMS ? Max{}(a, b) : Min{}(a, b);
}

REAP_DEVICE double warp_field(int field, double value) {
    return warp_reduce(value, [field](double a, double b) { return combined(field, a, b); });
}

// Grid (M, G): the fields of one tile's rows that count and belong to one group.
__global__ void __launch_bounds__(THREADS) sum_tiles(Reduce call) {
    REAP_SHARED(double, parts);  // [FIELDS][warps]
    const int tile = blockIdx.x;
    if (tile >= call.firsts[call.experts]) return;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int expert = call.tile_experts[tile];
    const std::int64_t first = call.tile_rows[tile], end = call.offsets[expert + 1];
    const std::int64_t last = first + call.block_m < end ? first + call.block_m : end;
    Fields own;
    for (std::int64_t row = first + threadIdx.x; row < last; row += THREADS) {
        const std::int64_t slot = call.gather_index[row], token = slot / call.top_k;
        if (call.mask != nullptr && !call.mask[token]) continue;
        if (call.group != nullptr && call.group[token] != blockIdx.y) continue;
        const double weight =
            load_float(call.router_weights, static_cast<Dtype>(call.router_weights_dtype), slot);
        own.add(weight, call.norm[slot], call.high[slot], call.low[slot]);
    }
#pragma unroll
    for (int field = 0; field < FIELDS; ++field) {
        const double whole = warp_field(field, own.at[field]);
        if (lane == 0) parts[field * (THREADS / WARP) + warp] = whole;
    }
    __syncthreads();
    if (threadIdx.x >= FIELDS) return;
    const double* const mine = parts + threadIdx.x * (THREADS / WARP);
    double whole = mine[0];
    for (int other = 1; other < THREADS / WARP; ++other)
        whole = combined(threadIdx.x, whole, mine[other]);
    const std::int64_t cell = threadIdx.x * std::int64_t{gridDim.y} + blockIdx.y;
    call.partials[cell * call.max_tiles + tile] = whole;
}

// Grid (E, G), a warp per field: adds one expert's tiles to the statistics, in place.
__global__ void __launch_bounds__(WARP* FIELDS) add_partials(Reduce call) {
    const int expert = blockIdx.x, field = threadIdx.y;
    const int stop = call.firsts[expert + 1];
    const std::int64_t row = field * std::int64_t{gridDim.y} + blockIdx.y;
    const double* const partials = call.partials + row * call.max_tiles;
    double whole = nothing(field);
    for (int tile = call.firsts[expert] + threadIdx.x; tile < stop; tile += WARP)
        whole = combined(field, whole, partials[tile]);
    whole = warp_field(field, whole);
    if (threadIdx.x) return;
    const std::int64_t cells = std::int64_t{call.groups} * call.experts;
    const std::int64_t cell = (call.first_group + std::int64_t{blockIdx.y}) * call.experts + expert;
    if (field < COUNTS) {
        call.counts[field * cells + cell] += static_cast<std::int64_t>(whole);
    } else if (field < COUNTS + SUMS) {
        call.sums[(field - COUNTS) * cells + cell] += whole;
    } else {
        float& to = call.extrema[(field - COUNTS - SUMS) * cells + cell];
        to = static_cast<float>(combined(field, to, whole));
    }
}

}  // namespace

int reduce_slots(const Reduce& call, Where where) {
    if (call.experts < 1 || call.groups < 1 || call.groups > 65535 || call.block_m < 1 ||
        call.top_k < 1 || call.max_tiles < 0 || call.max_tiles > MOST_BLOCKS)
        return INVALID_VALUE;
    if (call.max_tiles == 0) return SUCCESS;
    const unsigned groups = call.group == nullptr ? 1u : static_cast<unsigned>(call.groups);
    const int status = launch(sum_tiles, {static_cast<unsigned>(call.max_tiles), groups}, {THREADS},
                              FIELDS * (THREADS / WARP) * sizeof(double), where, call);
    if (status != SUCCESS) return status;
    return launch(add_partials, {static_cast<unsigned>(call.experts), groups}, {WARP, FIELDS}, 0,
                  where, call);
}

}  // namespace reap
