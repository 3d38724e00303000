// Combination with norms: the one read of y that a layer needs anyway, so that norms cost no bytes.
//
// Arrays, with S = T * k slots:
//
//   y               [S, H]       expert outputs before the router weight, by sorted row, or by slot
//                                without scatter_index
//   router_weights  [S]          by slot
//   scatter_index   [S] int64    sorted row of each slot; rows from offsets[E] on are not served
//   out             [T, H]       sum over a token's slots of router weight * y, in y's dtype
//   norm            [S] float32  ||y|| by slot; high and low: its largest and smallest element
//
// A warp owns a token: it reads 16 bytes of each of its rows at a time, eight loads in flight a
// thread, sums over slots within a thread, and exchanges squares and extrema once, at the end.
#include "launch.cuh"
#include "types.cuh"
#include "warp.cuh"

namespace reap {
namespace {

constexpr int THREADS = 128;
constexpr int TOKENS = THREADS / WARP;  // of a block

// A token's rows: lane s holds slot s, the others read it by shuffles.
template <class T>
struct Rows {
    using W = typename Wide<T>::type;
    std::int64_t row = 0;
    W weight = 0;
    unsigned live;  // bit s: slot s is served

    REAP_DEVICE Rows(const Combine& call, std::int64_t token, int lane) {
        bool served = lane < call.top_k;
        if (served) {
            const std::int64_t slot = token * call.top_k + lane;
            row = call.scatter_index == nullptr ? slot : call.scatter_index[slot];
            served = call.scatter_index == nullptr || row < call.offsets[call.experts];
            if (served)
                weight = static_cast<W>(load_float(
                    call.router_weights, static_cast<Dtype>(call.router_weights_dtype), slot));
        }
        live = __ballot_sync(ALL_LANES, served);
    }

    REAP_DEVICE bool serves(int s) const { return live >> s & 1u; }
    REAP_DEVICE std::int64_t row_of(int s) const { return __shfl_sync(ALL_LANES, row, s); }
    REAP_DEVICE W weight_of(int s) const { return __shfl_sync(ALL_LANES, weight, s); }
};

template <class W, int SLOTS>
struct Measures {
    W square[SLOTS], high[SLOTS], low[SLOTS];

    REAP_DEVICE Measures() {
#pragma unroll
        for (int s = 0; s < SLOTS; ++s) {
            square[s] = 0;
            high[s] = -INFINITY;
            low[s] = INFINITY;
        }
    }

    REAP_DEVICE void add(int s, W x) {
        square[s] = fma(x, x, square[s]);
        high[s] = Max{}(high[s], x);
        low[s] = Min{}(low[s], x);
    }
};

// Grid (T / TOKENS). SLOTS: top_k rounded up to a power of two. VECTOR: elements of a load.
template <class T, int SLOTS, int VECTOR>
__global__ void __launch_bounds__(THREADS) combine_tokens(Combine call) {
    using W = typename Wide<T>::type;
    using Loaded = Vector<T, VECTOR>;
    constexpr int COLUMNS = SLOTS >= 8 ? 1 : 8 / SLOTS;  // loads of one row in flight
    const int lane = threadIdx.x % WARP;
    const std::int64_t token = std::int64_t{blockIdx.x} * TOKENS + threadIdx.x / WARP;
    if (token >= call.tokens) return;
    const Rows<T> rows(call, token, lane);
    const T* const y = static_cast<const T*>(call.y);
    T* const out = call.out == nullptr ? nullptr : static_cast<T*>(call.out) + token * call.hidden;
    const bool observes = call.norm != nullptr;
    Measures<W, SLOTS> measures;
    // The same number of rounds for every lane: they exchange rows and router weights in each.
    for (std::int64_t start = 0; start < call.hidden; start += WARP * VECTOR * COLUMNS) {
        // Loads come first, and nothing is set where there is none to do: a value to fall back on
        // would make each load wait for the one before.
        Loaded loaded[COLUMNS][SLOTS];
#pragma unroll
        for (int s = 0; s < SLOTS; ++s) {
            const T* const from = y + rows.row_of(s) * call.hidden;
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) {
                const std::int64_t at = start + (c * WARP + lane) * VECTOR;
                if (rows.serves(s) && at < call.hidden)
                    loaded[c][s] = load_once<T, VECTOR>(from + at);
            }
        }
        W total[COLUMNS][VECTOR] = {};
#pragma unroll
        for (int s = 0; s < SLOTS; ++s) {
            const W weight = rows.weight_of(s);
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) {
                if (!rows.serves(s) || start + (c * WARP + lane) * VECTOR >= call.hidden) continue;
#pragma unroll
                for (int v = 0; v < VECTOR; ++v) {
                    const W x = widen(loaded[c][s].at[v]);
                    total[c][v] = fma(weight, x, total[c][v]);
                    if (observes) measures.add(s, x);
                }
            }
        }
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
            const std::int64_t at = start + (c * WARP + lane) * VECTOR;
            if (out == nullptr || at >= call.hidden) continue;
            Loaded sum;
#pragma unroll
            for (int v = 0; v < VECTOR; ++v) narrow(total[c][v], sum.at[v]);
            store(out + at, sum);
        }
    }
    if (!observes) return;
    const W square = warp_reduce_rows<SLOTS>(measures.square, lane, Sum{});
    const W high = warp_reduce_rows<SLOTS>(measures.high, lane, Max{});
    const W low = warp_reduce_rows<SLOTS>(measures.low, lane, Min{});
    constexpr int SHARE = WARP / SLOTS;  // lanes that hold the same slot's result
    const int s = lane / SHARE;
    if (lane % SHARE || !rows.serves(s)) return;
    const std::int64_t slot = token * call.top_k + s;
    call.norm[slot] = static_cast<float>(sqrt(square));
    call.high[slot] = static_cast<float>(high);
    call.low[slot] = static_cast<float>(low);
}

template <class T, int SLOTS, int VECTOR>
int run(const Combine& call, Where where) {
    const std::int64_t blocks = ceil_div(call.tokens, TOKENS);
    if (blocks > MOST_BLOCKS) return INVALID_VALUE;
    return launch(combine_tokens<T, SLOTS, VECTOR>, {static_cast<unsigned>(blocks)}, {THREADS}, 0,
                  where, call);
}

template <class T>
int run_float(const Combine& call, Where where) {
    constexpr int VECTOR = 16 / sizeof(T);
    // Rows that begin anywhere are read element by element; few slots gain nothing there.
    if (!call.wide) return call.top_k <= 8 ? run<T, 8, 1>(call, where) : run<T, 32, 1>(call, where);
    if (call.top_k == 1) return run<T, 1, VECTOR>(call, where);
    if (call.top_k == 2) return run<T, 2, VECTOR>(call, where);
    if (call.top_k <= 4) return run<T, 4, VECTOR>(call, where);
    if (call.top_k <= 8) return run<T, 8, VECTOR>(call, where);
    // The more rows, the less of each at a time: measures of all of them stay in registers.
    if (call.top_k <= 16) return run<T, 16, 4>(call, where);
    return run<T, 32, 4 / sizeof(T)>(call, where);
}

}  // namespace

int combine_rows(const Combine& call, Where where) {
    if (call.top_k < 1 || call.top_k > COMBINE_SLOTS || call.tokens < 0 || call.hidden < 0 ||
        (call.out != nullptr && call.out_dtype != call.y_dtype))
        return INVALID_VALUE;
    if (call.tokens == 0) return SUCCESS;
    switch (static_cast<Dtype>(call.y_dtype)) {
        case Dtype::bf16:
            return run_float<bf16>(call, where);
        case Dtype::fp16:
            return run_float<fp16>(call, where);
        case Dtype::fp32:
            return run_float<float>(call, where);
        case Dtype::fp64:  // rows that a host brings, one per slot
            if (call.top_k != 1) return INVALID_VALUE;
            return call.wide ? run<double, 1, 2>(call, where) : run<double, 1, 1>(call, where);
        default:
            return INVALID_VALUE;
    }
}

}  // namespace reap
