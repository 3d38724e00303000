// Reductions over the threads of a warp and of a block, by fixed trees.
#pragma once

#include "device.cuh"

namespace reap {

struct Sum {
    template <class T>
    REAP_DEVICE T operator()(T a, T b) const {
        return a + b;
    }
};
// Of NaN and a number these give the number; a NaN shows in the norms.
struct Max {
    REAP_DEVICE float operator()(float a, float b) const { return fmaxf(a, b); }
    REAP_DEVICE double operator()(double a, double b) const { return fmax(a, b); }
};
struct Min {
    REAP_DEVICE float operator()(float a, float b) const { return fminf(a, b); }
    REAP_DEVICE double operator()(double a, double b) const { return fmin(a, b); }
};

// The whole warp's `value`, in every lane.
template <class T, class Op>
REAP_DEVICE T warp_reduce(T value, Op op) {
#pragma unroll
    for (int bit = WARP / 2; bit > 0; bit /= 2)
        value = op(value, __shfl_xor_sync(ALL_LANES, value, bit));
    return value;
}

// ROWS values per lane, each over the warp; ROWS a power of two. Returns row `lane / (WARP /
// ROWS)`. Lanes halve the rows they hold while they fold, so that 8 rows cost 9 exchanges and
// not 40.
template <int ROWS, int BIT = WARP / 2, class T, class Op>
REAP_DEVICE T warp_reduce_rows(const T* values, int lane, Op op) {
    if constexpr (BIT == 0) {
        return values[0];
    } else if constexpr (ROWS == 1) {
        const T folded = op(values[0], __shfl_xor_sync(ALL_LANES, values[0], BIT));
        return warp_reduce_rows<1, BIT / 2>(&folded, lane, op);
    } else {
        constexpr int HALF = ROWS / 2;
        const bool upper = lane & BIT;
        T folded[HALF];
#pragma unroll
        for (int i = 0; i < HALF; ++i) {
            const T given = upper ? values[i] : values[i + HALF];
            const T kept = upper ? values[i + HALF] : values[i];
            folded[i] = op(kept, __shfl_xor_sync(ALL_LANES, given, BIT));
        }
        return warp_reduce_rows<HALF, BIT / 2>(folded, lane, op);
    }
}

// Sum of `value` over the lanes before this one.
REAP_DEVICE int warp_exclusive_sum(int value, int lane) {
    int upto = value;
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        const int before = __shfl_up_sync(ALL_LANES, upto, step);
        if (lane >= step) upto += before;
    }
    return upto - value;
}

}  // namespace reap
