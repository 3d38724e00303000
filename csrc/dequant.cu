// Dequantization of experts to bf16, one kernel per format: value = code * scale in float32,
// rounded once.
//
// Arrays, for E experts of [N, K] matrices:
//
//   values   [E, N, K] E4M3, [E, N, K / 2] bytes of two E2M1, or [E, N, K / 8] words of eight 4-bit
//            integers; the lowest bits are the first element
//   scales   [E, ceil(N / block_rows), ceil(K / block_columns)]
//   offsets  [E + 1] int64, or null: an expert without rows is skipped
//   out      [E, N, K] bf16
//
// Stores have two to four times the bytes of loads, so they decide: a thread makes a chunk of 8
// elements, one store of 16 bytes, and adjacent threads make adjacent chunks, so that a warp writes
// 512 bytes that lie together. Loads are then of 8 or 4 bytes per thread and as dense. A thread
// loads its FLIGHT chunks, THREADS apart, before it stores the first.
#include <bit>
#include <type_traits>

#include "launch.cuh"
#include "quantized.cuh"

namespace reap {
namespace {

constexpr int THREADS = 256;
constexpr int FLIGHT = 8;
constexpr int MOST_EXPERTS = 65535;  // of a grid, along y

// A call as kernels take it. Chunks are counted within an expert.
struct Job {
    const void* values;
    const void* scales;
    const std::int64_t* offsets;
    bf16* out;
    unsigned chunks;
    unsigned scale_count;  // of an expert
    // Chunks of a row (E4M3) or of a scale (4-bit integers), and THREADS divided by that.
    unsigned divisor, quotient_step, remainder_step;
    // E4M3: a block's rows and chunks as powers of two, and scales of a row of blocks.
    unsigned row_shift, chunk_shift, scale_columns;
};

// Quotient and remainder of a thread's chunk by `divisor`, divided once and then advanced.
struct Place {
    unsigned quotient, remainder;

    REAP_DEVICE Place(const Job& job, unsigned chunk)
        : quotient(chunk / job.divisor), remainder(chunk - quotient * job.divisor) {}

    REAP_DEVICE void advance(const Job& job) {
        quotient += job.quotient_step;
        remainder += job.remainder_step;
        if (remainder < job.divisor) return;
        remainder -= job.divisor;
        ++quotient;
    }
};

// A format names the bits of a chunk (Word), its elements (WIDTH) and its scales' type, finds the
// scale of a chunk, and widens element `i`, known when compiling.

template <class S, int VECTOR>
struct E4m3 {
    using Word = std::conditional_t<VECTOR == 8, std::uint64_t, std::uint8_t>;
    using Scale = S;
    static constexpr int WIDTH = VECTOR;

    static REAP_DEVICE unsigned scale_of(const Job& job, unsigned, const Place& place) {
        return (place.quotient >> job.row_shift) * job.scale_columns +
               (place.remainder >> job.chunk_shift);
    }
    static REAP_DEVICE float element(Word word, int i) {
        return widen_e4m3(static_cast<std::uint32_t>(word >> 8 * i) << 24);
    }
};

struct E2m1 {
    using Word = std::uint32_t;
    using Scale = std::uint8_t;
    static constexpr int WIDTH = 8;

    static REAP_DEVICE unsigned scale_of(const Job&, unsigned chunk, const Place&) {
        return chunk / 4;  // 32 elements; rows hold whole scales
    }
    static REAP_DEVICE float element(Word word, int i) { return widen_e2m1(word << (28 - 4 * i)); }
};

template <class S>
struct Int4 {
    using Word = std::uint32_t;
    using Scale = S;
    static constexpr int WIDTH = 8;

    static REAP_DEVICE unsigned scale_of(const Job&, unsigned, const Place& place) {
        return place.quotient;  // rows hold whole scales
    }
    static REAP_DEVICE float element(Word word, int i) { return widen_int4(word >> 4 * i & 15u); }
};

REAP_DEVICE float widen_scale(std::uint8_t code) { return widen_e8m0(code); }
REAP_DEVICE float widen_scale(bf16 scale) { return widen(scale); }
REAP_DEVICE float widen_scale(fp16 scale) { return widen(scale); }
REAP_DEVICE float widen_scale(float scale) { return scale; }

// What is read once leaves the caches to what was just written.
template <class Word>
REAP_DEVICE Word load_streaming(const Word* from) {
#ifdef __CUDACC__
    return __ldcs(from);
#else
    return *from;
#endif
}

// Grid (chunks / (THREADS * FLIGHT), E).
template <class Format>
__global__ void __launch_bounds__(THREADS) dequantize(Job job) {
    using Word = typename Format::Word;
    using Scale = typename Format::Scale;
    constexpr int WIDTH = Format::WIDTH;
    const std::int64_t expert = blockIdx.y;
    if (job.offsets != nullptr && job.offsets[expert] == job.offsets[expert + 1]) return;
    const Word* const values = static_cast<const Word*>(job.values) + expert * job.chunks;
    const Scale* const scales = static_cast<const Scale*>(job.scales) + expert * job.scale_count;
    bf16* const out = job.out + expert * job.chunks * WIDTH;
    const unsigned first = blockIdx.x * (THREADS * FLIGHT) + threadIdx.x;
    Place place(job, first);
    Word words[FLIGHT];
    Scale factors[FLIGHT];
#pragma unroll
    for (int u = 0; u < FLIGHT; ++u) {
        const unsigned chunk = first + u * THREADS;
        words[u] = Word{};
        factors[u] = Scale{};
        if (chunk < job.chunks) {
            words[u] = load_streaming(values + chunk);
            factors[u] = scales[Format::scale_of(job, chunk, place)];
        }
        place.advance(job);
    }
#pragma unroll
    for (int u = 0; u < FLIGHT; ++u) {
        const unsigned chunk = first + u * THREADS;
        if (chunk >= job.chunks) return;
        const float scale = widen_scale(factors[u]);
        Vector<bf16, WIDTH> made;
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) narrow(Format::element(words[u], i) * scale, made.at[i]);
        store(out + std::int64_t{chunk} * WIDTH, made);
    }
}

template <class Format>
int run(const Dequant& call, unsigned divisor, Where where) {
    const std::int64_t chunks = call.rows * call.columns / Format::WIDTH;
    const std::int64_t columns = ceil_div(call.columns, call.block_columns);
    const std::int64_t scales = ceil_div(call.rows, call.block_rows) * columns;
    if (call.experts < 1 || call.experts > MOST_EXPERTS || chunks < 1 || chunks > MOST_BLOCKS)
        return INVALID_VALUE;
    Job job{};
    job.values = call.values;
    job.scales = call.scales;
    job.offsets = call.offsets;
    job.out = static_cast<bf16*>(call.out);
    job.chunks = static_cast<unsigned>(chunks);
    job.scale_count = static_cast<unsigned>(scales);
    job.divisor = divisor;
    job.quotient_step = THREADS / divisor;
    job.remainder_step = THREADS % divisor;
    job.scale_columns = static_cast<unsigned>(columns);
    job.row_shift = std::countr_zero(static_cast<unsigned>(call.block_rows));
    job.chunk_shift = std::countr_zero(static_cast<unsigned>(call.block_columns / Format::WIDTH));
    const auto blocks = static_cast<unsigned>(ceil_div(chunks, THREADS * FLIGHT));
    return launch(dequantize<Format>, {blocks, static_cast<unsigned>(call.experts)}, {THREADS}, 0,
                  where, job);
}

bool power_of_two(int number) { return number > 0 && !(number & (number - 1)); }

template <class S>
int run_e4m3(const Dequant& call, Where where) {
    const auto columns = static_cast<unsigned>(call.columns);
    // A chunk of 8 lies in one row and has one scale.
    if (columns % 8 == 0 && call.block_columns >= 8)
        return run<E4m3<S, 8>>(call, columns / 8, where);
    return run<E4m3<S, 1>>(call, columns, where);
}

}  // namespace

int dequantize_fp8(const Dequant& call, Where where) {
    if (call.columns < 1 || !power_of_two(call.block_rows) || !power_of_two(call.block_columns))
        return INVALID_VALUE;
    switch (static_cast<Dtype>(call.scales_dtype)) {
        case Dtype::fp32:
            return run_e4m3<float>(call, where);
        case Dtype::bf16:
            return run_e4m3<bf16>(call, where);
        default:
            return INVALID_VALUE;
    }
}

int dequantize_mxfp4(const Dequant& call, Where where) {
    if (call.columns % 32 || call.block_rows != 1 || call.block_columns != 32) return INVALID_VALUE;
    return run<E2m1>(call, 1, where);
}

int dequantize_int4(const Dequant& call, Where where) {
    const int group = call.block_columns;
    if (group < 8 || group % 8 || call.columns % group || call.block_rows != 1)
        return INVALID_VALUE;
    const unsigned divisor = static_cast<unsigned>(group) / 8;
    switch (static_cast<Dtype>(call.scales_dtype)) {
        case Dtype::bf16:
            return run<Int4<bf16>>(call, divisor, where);
        case Dtype::fp16:
            return run<Int4<fp16>>(call, divisor, where);
        case Dtype::fp32:
            return run<Int4<float>>(call, divisor, where);
        default:
            return INVALID_VALUE;
    }
}

}  // namespace reap
