// One product of all experts on Hopper: out[row, n] = act(sum over k of W[n, k] x[row, k]), where W
// is the matrix of the row's expert.
//
// Arrays. S sorted rows, E experts; see sort.cu for gather_index, offsets and tiles, which here are
// of PRODUCT_ROWS rows.
//
//   tokens   [T, K] or [S, K]  row r is x[r], or with gather_index x[gather_index[r] / top_k]
//   weights  [N, K] per expert, by tensor maps; gated: [N, K] gates and [N, K] ups
//   out      [S, N]            rows below offsets[E] are written, the others are not
//
// wgmma computes D^T: 128 weight rows x at most 256 tokens. An expert's last tile then costs as
// many columns as it has tokens, in steps of 32. Blocks stay, and walk the same list of tiles. Each
// has one producer warp group, which fills a ring of stages (weights by TMA, tokens by TMA or,
// gathered, by cp.async: Hopper's TMA gathers no rows), and two consumer warp groups. Those own 64
// weight rows each, share every stage and do not wait for each other: one may be in its epilogue
// while the other's products run, as far as the ring lets them drift apart.
//
// Gated weights lie in a stage as 8 gate rows, 8 up rows, 8 gate rows, ..., by the order of the
// tensor map's dimensions: gate and up of one element are then registers of one thread.
#pragma once

#include "hopper.cuh"
#include "launch.cuh"

namespace reap::grouped {

constexpr int GROUP = 128, CONSUMERS = 2;  // threads of a warp group; consumer groups
constexpr int STAGES = 4, DEPTH = 64;      // of the ring; elements of K in a stage
constexpr int WEIGHT_ROWS = 128, STEP = 32;
constexpr int ROW_BYTES = DEPTH * 2;
constexpr int WEIGHT_BYTES = WEIGHT_ROWS * ROW_BYTES, TOKEN_BYTES = PRODUCT_ROWS * ROW_BYTES;
constexpr int STAGE_BYTES = WEIGHT_BYTES + TOKEN_BYTES;
constexpr int STAGING = 16384;  // bytes of a consumer's results on their way out
constexpr int ALIGNMENT = 1024;
constexpr int SHARED = STAGES * STAGE_BYTES + CONSUMERS * STAGING + 2 * STAGES * 8 + ALIGNMENT;
constexpr int CHUNK = 8;  // elements of 16 bytes

// Every gated formula of `Activation`, by its numbers. With
// g = min(gate, gate_limit) and u = clamp(up, -up_limit, up_limit):
//
//   min(g sigmoid(g (slope + cubic g^2)), value_limit) (u + shift)
struct Form {
    float gate_limit, up_limit, value_limit, slope, cubic, shift;
};

// [E, N], with free strides, or null.
struct Bias {
    const void* base;
    std::int64_t expert_stride, row_stride;
};

struct Call {
    const unsigned char* tokens;
    const std::int64_t* gather_index;  // or null: rows are sorted, and come by TMA
    const std::int64_t* offsets;
    const std::int32_t* tile_experts;
    const std::int32_t* tile_rows;
    const std::int32_t* tiles;  // how many there are
    const Map* maps;            // one per expert, or null: one map of all
    const std::int32_t* swaps;  // likewise: whether ups lie before gates
    bool swapped;               // of the one map
    bool square;                // relu(x)^2, of what is not gated
    Form form;
    Bias bias, gate_bias;
    void* out;
    std::uint32_t token_chunks;  // 16-byte chunks from a token to the next
    int top_k, depth, width;     // depth is K, width is N
    int weight_tiles;            // of out's columns
    int group;                   // token tiles that share weights before the next weight tile
};

struct Tile {
    int expert, first, stop, weights;  // stop: one past its last sorted row

    // Made one tile ahead, so that nobody waits for what it loads.
    REAP_DEVICE Tile(const Call& call, int index, int tiles) {
        const int total = tiles * call.weight_tiles;
        index = index < total ? index : total - 1;
        const int band = call.group * call.weight_tiles, start = index / band * call.group;
        const int members = tiles - start < call.group ? tiles - start : call.group;
        const int inside = index - start * call.weight_tiles;
        expert = call.tile_experts[start + inside % members];
        first = call.tile_rows[start + inside % members];
        weights = inside / members;
    }
    REAP_DEVICE void find_stop(const Call& call) {
        const std::int64_t end = call.offsets[expert + 1],
                           most = std::int64_t{first} + PRODUCT_ROWS;
        stop = static_cast<int>(end < most ? end : most);
    }
    REAP_DEVICE int columns() const { return (stop - first + STEP - 1) / STEP * STEP; }
};

// Where a role is in the ring of stages.
struct Ring {
    int stage = 0;
    unsigned parity = 0;
    REAP_DEVICE void next() {
        if (++stage < STAGES) return;
        stage = 0;
        parity ^= 1;
    }
};

// A block's shared memory: stages of weights and tokens, staging of each consumer, barriers.
struct Shared {
    unsigned char* base;
    REAP_DEVICE unsigned char* weights(int stage) const { return base + stage * STAGE_BYTES; }
    REAP_DEVICE unsigned char* tokens(int stage) const { return weights(stage) + WEIGHT_BYTES; }
    REAP_DEVICE unsigned char* staging(int consumer) const {
        return base + STAGES * STAGE_BYTES + consumer * STAGING;
    }
    REAP_DEVICE std::uint64_t* full(int stage) const {
        return reinterpret_cast<std::uint64_t*>(staging(CONSUMERS)) + stage;
    }
    REAP_DEVICE std::uint64_t* empty(int stage) const { return full(stage) + STAGES; }
};

constexpr int COPY_ROWS = GROUP / CHUNK;  // tokens that the producer copies at once
constexpr int COPIES = PRODUCT_ROWS / COPY_ROWS;

// Where a producer thread's part of each of its tokens lies, in 16-byte chunks from `tokens`. Rows
// past the tile's last repeat its first.
REAP_DEVICE void find_tokens(const Call& call, const Tile& tile, std::uint32_t (&from)[COPIES]) {
    const int chunk = threadIdx.x % CHUNK, sub = threadIdx.x / CHUNK;
#pragma unroll
    for (int i = 0; i < COPIES; ++i) {
        const int row = tile.first + i * COPY_ROWS + sub;
        const auto slot =
            static_cast<std::uint32_t>(call.gather_index[row < tile.stop ? row : tile.first]);
        from[i] = slot / static_cast<std::uint32_t>(call.top_k) * call.token_chunks + chunk;
    }
}

// Copies K's elements k to k + 63 of a tile's tokens as TMA would lay them: swizzled, and zeros
// past the end of K.
REAP_DEVICE void copy_tokens(const Call& call, const std::uint32_t (&from)[COPIES], int columns,
                             int k, unsigned char* stage) {
    const int chunk = threadIdx.x % CHUNK, sub = threadIdx.x / CHUNK;
    unsigned char* const to = stage + sub * ROW_BYTES + (chunk ^ sub % CHUNK) * 16;
    const int bytes = k + chunk * CHUNK < call.depth ? 16 : 0;
    const unsigned char* const base = call.tokens + (bytes ? k * 2 : 0);
#pragma unroll
    for (int i = 0; i < COPIES; ++i)
        if (i * COPY_ROWS < columns)
            copy16(to + i * COPY_ROWS * ROW_BYTES, base + std::uint64_t{from[i]} * 16, bytes);
}

// One thread asks TMA for a stage's weights, and for its tokens where they are not gathered.
template <bool GATED>
REAP_DEVICE void load_stage(const Call& call, const Map* weights, const Map* tokens,
                            const Tile& tile, int k, Shared at, int stage) {
    std::uint64_t* const full = at.full(stage);
    const bool gather = call.gather_index != nullptr;
    const int columns = gather ? 0 : tile.columns(), matrix = call.maps ? 0 : tile.expert;
    barrier_expect(full, WEIGHT_BYTES + columns * ROW_BYTES);
    if constexpr (GATED)
        tma_load_5d(at.weights(stage), weights, full, k, 0, 0, tile.weights * (WEIGHT_ROWS / 16),
                    matrix);
    else
        tma_load_5d(at.weights(stage), weights, full, k, tile.weights * WEIGHT_ROWS, 0, 0, matrix);
    for (int row = 0; row < columns; row += STEP)
        tma_load_2d(at.tokens(stage) + row * ROW_BYTES, tokens, full, k, tile.first + row);
}

template <bool GATED>
REAP_DEVICE void produce(const Call& call, const Map* weights, const Map* tokens, Shared at) {
    const bool gather = call.gather_index != nullptr;
    const int tiles = *call.tiles, total = tiles * call.weight_tiles;
    if (static_cast<int>(blockIdx.x) >= total || (!gather && threadIdx.x != 0)) return;
    Tile tile(call, blockIdx.x, tiles);
    tile.find_stop(call);
    Ring ring;
    for (int index = blockIdx.x; index < total; index += gridDim.x) {
        Tile next(call, index + gridDim.x, tiles);
        const Map* const map = call.maps ? call.maps + tile.expert : weights;
        if (call.maps && threadIdx.x == 0) acquire_map(map);
        std::uint32_t from[COPIES];
        if (gather) find_tokens(call, tile, from);
        next.find_stop(call);
        for (int k = 0; k < call.depth; k += DEPTH, ring.next()) {
            barrier_wait(at.empty(ring.stage), ring.parity ^ 1);
            if (threadIdx.x == 0) load_stage<GATED>(call, map, tokens, tile, k, at, ring.stage);
            if (gather) {
                copy_tokens(call, from, tile.columns(), k, at.tokens(ring.stage));
                barrier_arrive_copies(at.full(ring.stage));
            }
        }
        tile = next;
    }
}

// sum = this consumer's 64 weight rows x N tokens, over all of K. A stage is freed once each warp
// that has read it says so: the next step's products are under way by then.
template <class T, int N>
REAP_DEVICE void multiply(float (&sum)[ACCUMULATOR], const Call& call, Shared at, Ring& ring,
                          int consumer) {
    const bool gather = call.gather_index != nullptr, speaks = threadIdx.x % WARP == 0;
    Ring before = ring;
#pragma unroll 1
    for (int k = 0; k < call.depth; k += DEPTH, ring.next()) {
        barrier_wait(at.full(ring.stage), ring.parity);
        if (gather) generic_writes_to_async_reads();
        const std::uint64_t a =
            matrix(at.weights(ring.stage) + consumer * (WEIGHT_BYTES / CONSUMERS));
        const std::uint64_t b = matrix(at.tokens(ring.stage));
        keep<N>(sum);
        products_begin();
#pragma unroll
        for (int i = 0; i < DEPTH / 16; ++i)  // 16 elements of K are 32 bytes, 2 in a descriptor
            product<T, N>(sum, a + 2 * i, b + 2 * i, k != 0 || i != 0);
        products_commit();
        keep<N>(sum);
        products_wait<1>();
        if (k == 0) continue;
        if (speaks) barrier_arrive(at.empty(before.stage));
        before.next();
    }
    products_wait<0>();
    keep<N>(sum);
    if (speaks) barrier_arrive(at.empty(before.stage));
}

template <class T>
REAP_DEVICE void multiply_columns(float (&sum)[ACCUMULATOR], int columns, const Call& call,
                                  Shared at, Ring& ring, int consumer) {
    switch (columns) {
        case 32:
            return multiply<T, 32>(sum, call, at, ring, consumer);
        case 64:
            return multiply<T, 64>(sum, call, at, ring, consumer);
        case 96:
            return multiply<T, 96>(sum, call, at, ring, consumer);
        case 128:
            return multiply<T, 128>(sum, call, at, ring, consumer);
        case 160:
            return multiply<T, 160>(sum, call, at, ring, consumer);
        case 192:
            return multiply<T, 192>(sum, call, at, ring, consumer);
        case 224:
            return multiply<T, 224>(sum, call, at, ring, consumer);
        default:
            return multiply<T, 256>(sum, call, at, ring, consumer);
    }
}

template <class T>
REAP_DEVICE float load_bias(const Bias& bias, int expert, int row, int width) {
    if (bias.base == nullptr || row >= width) return 0;
    return widen(
        static_cast<const T*>(bias.base)[expert * bias.expert_stride + row * bias.row_stride]);
}

// What a thread does to its sums before they are rounded. It holds two weight rows: gated, a gate
// and its up; else rows n and n + 8.
template <class T, bool GATED>
struct Epilogue {
    Form form;
    float first_bias, second_bias;  // of those rows
    bool swapped, square;

    // `row` is the first of the consumer's rows of out, `warp` the thread's warp in the group.
    REAP_DEVICE Epilogue(const Call& call, const Tile& tile, int row, int warp) {
        row += warp * (GATED ? 8 : 16) + threadIdx.x % WARP / 4;
        form = call.form;
        square = call.square;
        swapped = GATED && (call.swaps ? call.swaps[tile.expert] != 0 : call.swapped);
        first_bias = load_bias<T>(GATED ? call.gate_bias : call.bias, tile.expert, row, call.width);
        second_bias = load_bias<T>(call.bias, tile.expert, GATED ? row : row + 8, call.width);
    }
    REAP_DEVICE float gated(float first, float second) const {
        const float gate = at_most((swapped ? second : first) + first_bias, form.gate_limit);
        const float raised = (swapped ? first : second) + second_bias;
        const float up = at_least(at_most(raised, form.up_limit), -form.up_limit);
        // Not for others: 0 times infinity is NaN.
        const float slope = form.cubic != 0 ? form.slope + form.cubic * gate * gate : form.slope;
        return at_most(times_sigmoid(gate, gate * slope), form.value_limit) * (up + form.shift);
    }
    REAP_DEVICE float plain(float x) const {
        const float positive = at_least(x, 0);
        return square ? positive * positive : x;
    }
    // The matrices of one stmatrix, from sums of four groups of eight tokens (gated) or two.
    REAP_DEVICE void pack_matrices(const float* sum, std::uint32_t (&m)[4]) const {
        if constexpr (GATED) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float* const d = sum + 4 * i;
                m[i] = pack<T>(gated(d[0], d[2]), gated(d[1], d[3]));
            }
        } else {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float* const d = sum + 4 * i;
                m[2 * i] = pack<T>(plain(d[0] + first_bias), plain(d[1] + first_bias));
                m[2 * i + 1] = pack<T>(plain(d[2] + second_bias), plain(d[3] + second_bias));
            }
        }
    }
};

// Rows of a staging area are tokens, of 64 bytes (gated: 32 columns of out) or 128 (64 columns).
// Their chunks are moved so that neither stmatrix nor the loads after it meet in a bank.
template <bool GATED>
struct Staging {
    static constexpr int BYTES = GATED ? 64 : 128, CHUNKS = BYTES / 16, TOKENS = STAGING / BYTES;
    static constexpr int GROUPS = GATED ? 4 : 2;  // of eight tokens, in one stmatrix
    unsigned char* base;

    REAP_DEVICE unsigned char* at(int token, int chunk) const {
        return base + token * BYTES + (chunk ^ (GATED ? token / 2 % 4 : token % 8)) * 16;
    }
    // The row a lane names to stmatrix, for tokens from `token`.
    REAP_DEVICE unsigned char* row(int token, int warp) const {
        const int lane = threadIdx.x % WARP;
        if constexpr (GATED)  // four groups of eight tokens
            return at(token + lane, warp);
        else  // two groups of tokens, eight columns and the next eight
            return at(token + lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2);
    }
};

// Stores a consumer's sums: through its staging area, so that rows of out are written whole.
template <class T, bool GATED>
REAP_DEVICE void store_sums(const float (&sum)[ACCUMULATOR], const Call& call, const Tile& tile,
                            const Epilogue<T, GATED>& epilogue, Staging<GATED> staging, int column,
                            int consumer) {
    using Place = Staging<GATED>;
    const int thread = threadIdx.x % GROUP, warp = thread / WARP, columns = tile.columns();
    const int chunk = thread % Place::CHUNKS;
    T* const out = static_cast<T*>(call.out) + column + chunk * CHUNK;
#pragma unroll
    for (int start = 0; start < PRODUCT_ROWS; start += Place::TOKENS) {
        if (start >= columns) break;
        group_sync(1 + consumer);  // everyone has read what was here before
#pragma unroll
        for (int j = start / 8; j < (start + Place::TOKENS) / 8; j += Place::GROUPS) {
            if (j * 8 >= columns) break;
            std::uint32_t m[4];
            epilogue.pack_matrices(sum + 4 * j, m);
            store_transposed(staging.row(j * 8 - start, warp), m);
        }
        group_sync(1 + consumer);
        if (column + chunk * CHUNK >= call.width) continue;
        for (int token = thread / Place::CHUNKS; token < Place::TOKENS;
             token += GROUP / Place::CHUNKS) {
            const int row = tile.first + start + token;
            if (row >= tile.stop) break;
            store(out + static_cast<std::int64_t>(row) * call.width,
                  *reinterpret_cast<const Vector<T, CHUNK>*>(staging.at(token, chunk)));
        }
    }
}

template <class T, bool GATED>
REAP_DEVICE void consume(const Call& call, Shared at, int consumer) {
    const int warp = threadIdx.x % GROUP / WARP, tiles = *call.tiles;
    const int total = tiles * call.weight_tiles;
    if (static_cast<int>(blockIdx.x) >= total) return;
    Tile tile(call, blockIdx.x, tiles);
    tile.find_stop(call);
    Ring ring;
    float sum[ACCUMULATOR];
    for (int index = blockIdx.x; index < total; index += gridDim.x) {
        Tile next(call, index + gridDim.x, tiles);
        const int column = (tile.weights * CONSUMERS + consumer) * (GATED ? 32 : 64);
        const Epilogue<T, GATED> epilogue(call, tile, column, warp);
        multiply_columns<T>(sum, tile.columns(), call, at, ring, consumer);
        next.find_stop(call);
        store_sums<T, GATED>(sum, call, tile, epilogue, {at.staging(consumer)}, column, consumer);
        tile = next;
    }
}

// Grid (multiprocessors, or fewer), GROUP * (1 + CONSUMERS) threads, SHARED bytes.
template <class T, bool GATED>
__global__ void __launch_bounds__(GROUP * (1 + CONSUMERS), 1)
    multiply_tiles(const __grid_constant__ Call call, const __grid_constant__ Map weights,
                   const __grid_constant__ Map tokens) {
    if constexpr (HOPPER) {
        REAP_SHARED(unsigned char, memory);
        const auto address = reinterpret_cast<std::uintptr_t>(memory);
        const Shared at{memory + (ALIGNMENT - address % ALIGNMENT) % ALIGNMENT};
        if (threadIdx.x == 0) {
            for (int stage = 0; stage < STAGES; ++stage) {
                barrier_init(at.full(stage), call.gather_index ? 1 + GROUP : 1);
                barrier_init(at.empty(stage), CONSUMERS * GROUP / WARP);
            }
            barriers_ready();
        }
        __syncthreads();
        if (threadIdx.x < GROUP) {
            fewer_registers<40>();
            produce<GATED>(call, &weights, &tokens, at);
        } else {
            more_registers<232>();
            consume<T, GATED>(call, at, threadIdx.x / GROUP - 1);
        }
    } else {
        refuse_to_run();
    }
}

}  // namespace reap::grouped
