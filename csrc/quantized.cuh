// Elements of quantized weights: codes of 8 and 4 bits, scales of 8, to float32. All exact.
#pragma once

#include "types.cuh"

namespace reap {

REAP_DEVICE float float_of(std::uint32_t bits) { return __builtin_bit_cast(float, bits); }

// Codes come in the top bits of a word: an arithmetic shift then moves exponent and mantissa to
// where float32 has them and keeps the sign, and one multiplication corrects the exponent's bias
// (of subnormal codes too, since float32's are computed as they are).

// E4M3 without infinities: S EEEE MMM, bias 7; all ones is NaN (448 is the largest).
REAP_DEVICE float widen_e4m3(std::uint32_t top) {
    const auto shifted = static_cast<std::uint32_t>(static_cast<std::int32_t>(top) >> 4);
    const float value = float_of(shifted & 0x87f00000u) * 0x1p120f;
    return fabsf(value) > 448.0f ? float_of(0x7fc00000u) : value;
}

// E2M1: S EE M, bias 1: 0, 0.5, 1, 1.5, 2, 3, 4, 6.
REAP_DEVICE float widen_e2m1(std::uint32_t top) {
    const auto shifted = static_cast<std::uint32_t>(static_cast<std::int32_t>(top) >> 6);
    return float_of(shifted & 0x81c00000u) * 0x1p126f;
}

// E8M0: 2^(code - 127), which is subnormal for 0; 255 is NaN.
REAP_DEVICE float widen_e8m0(std::uint8_t code) {
    const std::uint32_t bits = code == 0 ? 0x00400000u : std::uint32_t{code} << 23;
    return float_of(code == 255 ? 0x7fc00000u : bits);
}

// An integer of 4 bits, stored plus 8: put into the mantissa of 2^23, which needs no conversion.
REAP_DEVICE float widen_int4(std::uint32_t nibble) {
    return float_of(0x4b000000u | nibble) - 8388616.0f;
}

}  // namespace reap
