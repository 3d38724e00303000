// Element types, their conversions, and loads of 16 bytes.
#pragma once

#include "device.cuh"
#include "kernels.h"

namespace reap {

struct bf16 {
    std::uint16_t bits;
};
struct fp16 {
    std::uint16_t bits;
};

// What an element is computed in.
template <class T>
struct Wide {
    using type = float;
};
template <>
struct Wide<double> {
    using type = double;
};

#ifdef __CUDACC__

REAP_DEVICE float widen(bf16 x) { return __uint_as_float(std::uint32_t{x.bits} << 16); }
REAP_DEVICE float widen(fp16 x) { return __half2float(__ushort_as_half(x.bits)); }
REAP_DEVICE void narrow(float x, bf16& to) {
    to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
REAP_DEVICE void narrow(float x, fp16& to) { to.bits = __half_as_ushort(__float2half_rn(x)); }

#else

REAP_DEVICE float widen(bf16 x) { return __builtin_bit_cast(float, std::uint32_t{x.bits} << 16); }
REAP_DEVICE float widen(fp16 x) { return static_cast<float>(__builtin_bit_cast(_Float16, x.bits)); }
REAP_DEVICE void narrow(float x, bf16& to) {
    const auto bits = __builtin_bit_cast(std::uint32_t, x);
    // To the nearest, ties to even; a NaN must not be rounded into an infinity.
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to.bits = static_cast<std::uint16_t>(x != x ? 0x7fffu : rounded);
}
REAP_DEVICE void narrow(float x, fp16& to) {
    to.bits = __builtin_bit_cast(std::uint16_t, static_cast<_Float16>(x));
}

#endif

REAP_DEVICE float widen(float x) { return x; }
REAP_DEVICE double widen(double x) { return x; }
REAP_DEVICE void narrow(float x, float& to) { to = x; }
REAP_DEVICE void narrow(double x, double& to) { to = x; }

// N elements that lie together, loaded and stored at once.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
    T at[N];
};

// A load of what is read once: it does not displace what the caches hold.
template <class T, int N>
REAP_DEVICE Vector<T, N> load_once(const T* from) {
    using Whole = Vector<T, N>;
#ifdef __CUDACC__
    if constexpr (sizeof(Whole) == 16) {
        const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(from));
        return *reinterpret_cast<const Whole*>(&bits);
    }
#endif
    return *reinterpret_cast<const Whole*>(from);
}

template <class T, int N>
REAP_DEVICE void store(T* to, const Vector<T, N>& from) {
    *reinterpret_cast<Vector<T, N>*>(to) = from;
}

// One element of an array whose dtype is known at run time: router_weights come in several.
REAP_DEVICE double load_float(const void* base, Dtype dtype, std::int64_t at) {
    switch (dtype) {
        case Dtype::bf16:
            return widen(static_cast<const bf16*>(base)[at]);
        case Dtype::fp16:
            return widen(static_cast<const fp16*>(base)[at]);
        case Dtype::fp32:
            return static_cast<const float*>(base)[at];
        default:
            return static_cast<const double*>(base)[at];
    }
}

}  // namespace reap
