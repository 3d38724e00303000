// A stable counting sort of slots by expert, and the tiles of sorted rows that follow.
//
// Arrays. S slots; E experts, and bin E for foreign slots (id outside [0, E), weight exactly 0).
//
//   ids            [S] int32/int64   expert of each slot
//   topk_weights   [S] any float     router weight of each slot, or null
//   counts         [C, E + 1] int32  slots of each bin in each chunk of SORT_CHUNK slots, then
//                                    their exclusive sums over the chunks before
//   totals         [E + 1] int32     slots of each bin
//   offsets        [E + 1] int64     first sorted row of each expert; offsets[E] rows are served
//   gather_index   [S] int64         slot of each sorted row
//   scatter_index  [S] int64         sorted row of each slot
//
// One warp walks one chunk alone, 32 slots at a time: lanes with equal bins find each other and
// rank themselves, so there are no atomics and no barrier between warps, and equal ids give equal
// bits. Three launches: count, scan the counts of a bin over chunks, place.
#include "launch.cuh"
#include "types.cuh"
#include "warp.cuh"

namespace reap {
namespace {

constexpr int PLACE_WARPS = 4;  // of a block, as far as shared memory has counters for them
constexpr int ROUNDS = SORT_CHUNK / WARP;
constexpr int SCAN_ROWS = 32;
constexpr int SCAN_BATCH = 8;  // loads under way at once
constexpr int SCHEDULE_THREADS = 128;

// A lane's slots of a chunk: `first`, then every WARP-th; bit i of a result is slot i.
template <class Test>
REAP_DEVICE unsigned each_slot(std::int64_t first, std::int64_t slots, Test test) {
    unsigned found = 0;
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) {
        const std::int64_t slot = first + i * WARP;
        found |= static_cast<unsigned>(slot < slots && test(slot)) << i;
    }
    return found;
}

template <class T>
REAP_DEVICE unsigned zeros(const void* weights, std::int64_t first, std::int64_t slots) {
    const T* const at = static_cast<const T*>(weights);
    return each_slot(first, slots, [at](std::int64_t slot) { return widen(at[slot]) == 0; });
}

// Which of a lane's slots have weight exactly 0.
REAP_DEVICE unsigned zero_weights(const Sort& call, std::int64_t first) {
    if (call.topk_weights == nullptr) return 0;
    switch (static_cast<Dtype>(call.topk_weights_dtype)) {
        case Dtype::bf16:
            return zeros<bf16>(call.topk_weights, first, call.slots);
        case Dtype::fp16:
            return zeros<fp16>(call.topk_weights, first, call.slots);
        case Dtype::fp32:
            return zeros<float>(call.topk_weights, first, call.slots);
        default:
            return zeros<double>(call.topk_weights, first, call.slots);
    }
}

template <class T>
REAP_DEVICE void read_ids(const Sort& call, std::int64_t first, int (&bins)[ROUNDS]) {
    const T* const ids = static_cast<const T*>(call.ids);
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) {
        const std::int64_t slot = first + i * WARP;
        const std::int64_t id = slot < call.slots ? ids[slot] : -1;
        bins[i] = id < 0 || id >= call.experts ? call.experts : static_cast<int>(id);
    }
}

// Bins of a lane's slots: the expert that serves one, or E. All loads are under way at once.
REAP_DEVICE void read_bins(const Sort& call, std::int64_t first, int (&bins)[ROUNDS]) {
    const unsigned zero = zero_weights(call, first);
    if (static_cast<Dtype>(call.ids_dtype) == Dtype::int32)
        read_ids<std::int32_t>(call, first, bins);
    else
        read_ids<std::int64_t>(call, first, bins);
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i)
        if (zero >> i & 1u) bins[i] = call.experts;
}

// Walks one chunk in order. `next` has, for every bin, the number its next slot gets; lanes past
// the end hold a bin of their own, `bins`. `take(slot, number)` sees every slot once.
template <class Take>
REAP_DEVICE void walk_chunk(const Sort& call, std::int64_t chunk, std::int32_t* next, int lane,
                            Take take) {
    const std::int64_t first = chunk * SORT_CHUNK + lane;
    int bins[ROUNDS];
    read_bins(call, first, bins);
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) {
        const std::int64_t slot = first + i * WARP;
        const bool live = slot < call.slots;
        const unsigned equal = __match_any_sync(ALL_LANES, live ? bins[i] : call.experts + 1);
        const int rank = __popc(equal & ((1u << lane) - 1u));
        const std::int32_t number = next[bins[i]];
        __syncwarp();  // every lane has read before the first of equals writes
        if (live && rank == 0) next[bins[i]] = number + __popc(equal);
        __syncwarp();
        if (live) take(slot, number + rank);
    }
}

// Grid (C / warps): counts[chunk] = slots of each bin.
__global__ void count_bins(Sort call) {
    REAP_SHARED(std::int32_t, counters);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, bins = call.experts + 1;
    const std::int64_t chunk = static_cast<std::int64_t>(blockIdx.x) * (blockDim.x / WARP) + warp;
    if (chunk * SORT_CHUNK >= call.slots) return;
    std::int32_t* const mine = counters + warp * bins;
    for (int bin = lane; bin < bins; bin += WARP) mine[bin] = 0;
    __syncwarp();
    walk_chunk(call, chunk, mine, lane, [](std::int64_t, std::int32_t) {});
    for (int bin = lane; bin < bins; bin += WARP) call.counts[chunk * bins + bin] = mine[bin];
}

// Grid (bins / 32), threads (32 bins, SCAN_ROWS runs of chunks): exclusive sums over chunks.
__global__ void scan_chunks(Sort call) {
    REAP_SHARED(std::int32_t, runs);  // [SCAN_ROWS][WARP]
    const int bins = call.experts + 1, bin = blockIdx.x * WARP + threadIdx.x;
    const std::int64_t chunks = ceil_div(call.slots, SORT_CHUNK);
    const std::int64_t length = ceil_div(chunks, SCAN_ROWS);
    const std::int64_t first = threadIdx.y * length;
    const std::int64_t last = first + length < chunks ? first + length : chunks;
    const auto at = [&](std::int64_t chunk) -> std::int32_t& {
        return call.counts[chunk * bins + bin];
    };
    std::int32_t total = 0;
    if (bin < bins) {
#pragma unroll SCAN_BATCH
        for (std::int64_t chunk = first; chunk < last; ++chunk) total += at(chunk);
    }
    runs[threadIdx.y * WARP + threadIdx.x] = total;
    __syncthreads();
    if (bin >= bins) return;
    std::int32_t before = 0;
    for (unsigned row = 0; row < threadIdx.y; ++row) before += runs[row * WARP + threadIdx.x];
    if (threadIdx.y == SCAN_ROWS - 1) call.totals[bin] = before + total;
    for (std::int64_t chunk = first; chunk < last; chunk += SCAN_BATCH) {
        std::int32_t own[SCAN_BATCH];
#pragma unroll
        for (int i = 0; i < SCAN_BATCH; ++i) own[i] = chunk + i < last ? at(chunk + i) : 0;
#pragma unroll
        for (int i = 0; i < SCAN_BATCH; ++i) {
            if (chunk + i < last) at(chunk + i) = before;
            before += own[i];
        }
    }
}

// Exclusive sums of `totals` into `starts`, by the whole block; `sums` has a number per warp.
REAP_DEVICE void scan_totals(const std::int32_t* totals, int bins, std::int32_t* starts,
                             std::int32_t* sums) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int each = static_cast<int>(ceil_div(bins, blockDim.x));
    const int first = threadIdx.x * each, last = first + each < bins ? first + each : bins;
    std::int32_t own = 0;
    for (int bin = first; bin < last; ++bin) own += totals[bin];
    std::int32_t before = warp_exclusive_sum(own, lane);
    if (lane == WARP - 1) sums[warp] = before + own;
    __syncthreads();
    for (int other = 0; other < warp; ++other) before += sums[other];
    for (int bin = first; bin < last; ++bin) {
        starts[bin] = before;
        before += totals[bin];
    }
    __syncthreads();
}

// Grid (C / warps, at least 1): places every slot; each block finds the bins' first rows itself.
__global__ void place_slots(Sort call) {
    REAP_SHARED(std::int32_t, memory);  // [bins] starts, [warps][bins] counters, [warps] sums
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int bins = call.experts + 1, warps = blockDim.x / WARP;
    scan_totals(call.totals, bins, memory, memory + (1 + warps) * bins);
    if (blockIdx.x == 0)
        for (int bin = threadIdx.x; bin < bins; bin += blockDim.x) call.offsets[bin] = memory[bin];
    const std::int64_t chunk = static_cast<std::int64_t>(blockIdx.x) * warps + warp;
    if (chunk * SORT_CHUNK >= call.slots) return;
    std::int32_t* const mine = memory + (1 + warp) * bins;
    for (int bin = lane; bin < bins; bin += WARP)
        mine[bin] = memory[bin] + call.counts[chunk * bins + bin];
    __syncwarp();
    walk_chunk(call, chunk, mine, lane, [&](std::int64_t slot, std::int32_t row) {
        call.gather_index[row] = slot;
        call.scatter_index[slot] = row;
    });
}

REAP_DEVICE int tiles_of(const Schedule& call, int expert) {
    const std::int64_t rows = call.offsets[expert + 1] - call.offsets[expert];
    return static_cast<int>(ceil_div(rows, call.block_m));
}

// Grid (E): one block lists the tiles of one expert.
__global__ void list_tiles(Schedule call) {
    REAP_SHARED(int, sums);  // one per warp
    const int expert = blockIdx.x, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int before = 0;
    for (int other = threadIdx.x; other < expert; other += blockDim.x)
        before += tiles_of(call, other);
    before = warp_reduce(before, Sum{});
    if (lane == 0) sums[warp] = before;
    __syncthreads();
    before = 0;
    for (unsigned other = 0; other < blockDim.x / WARP; ++other) before += sums[other];
    const int own = tiles_of(call, expert);
    if (threadIdx.x == 0) {
        call.firsts[expert] = before;
        if (expert == call.experts - 1) call.firsts[call.experts] = before + own;
    }
    for (int tile = threadIdx.x; tile < own; tile += blockDim.x) {
        call.tile_experts[before + tile] = expert;
        call.tile_rows[before + tile] =
            static_cast<std::int32_t>(call.offsets[expert] + std::int64_t{tile} * call.block_m);
    }
}

bool is_float(int dtype) { return dtype >= int(Dtype::bf16) && dtype <= int(Dtype::fp64); }
bool is_integer(int dtype) { return dtype == int(Dtype::int32) || dtype == int(Dtype::int64); }

}  // namespace

int sort_slots(const Sort& call, Where where) {
    const bool weighted = call.topk_weights != nullptr;
    if (!is_integer(call.ids_dtype) || (weighted && !is_float(call.topk_weights_dtype)) ||
        call.experts < 1 || call.experts > SORT_EXPERTS || call.slots < 0 ||
        call.slots > MOST_BLOCKS)
        return INVALID_VALUE;
    const int bins = call.experts + 1;
    // 48 KiB hold the counters of 4 warps up to 2455 experts, and of one up to the limit.
    const unsigned bytes = 4u * static_cast<unsigned>(bins);
    const unsigned warps = (PLACE_WARPS + 1) * bytes + 16 <= 48u << 10 ? PLACE_WARPS : 1;
    const auto blocks = static_cast<unsigned>(ceil_div(ceil_div(call.slots, SORT_CHUNK), warps));
    if (blocks) {
        const int status = launch(count_bins, {blocks}, {warps * WARP}, warps * bytes, where, call);
        if (status != SUCCESS) return status;
    }
    const auto columns = static_cast<unsigned>(ceil_div(bins, WARP));
    const int status =
        launch(scan_chunks, {columns}, {WARP, SCAN_ROWS}, 4u * WARP * SCAN_ROWS, where, call);
    if (status != SUCCESS) return status;
    return launch(place_slots, {blocks ? blocks : 1}, {warps * WARP},
                  (warps + 1) * bytes + 4 * warps, where, call);
}

int schedule_tiles(const Schedule& call, Where where) {
    if (call.experts < 1 || call.block_m < 1) return INVALID_VALUE;
    return launch(list_tiles, {static_cast<unsigned>(call.experts)}, {SCHEDULE_THREADS},
                  4u * SCHEDULE_THREADS / WARP, where, call);
}

}  // namespace reap
