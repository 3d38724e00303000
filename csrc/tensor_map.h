// Tensor maps: what a TMA load knows of the tensor it loads boxes of.
#pragma once

#include <cstdint>

namespace reap {

constexpr int MAP_DIMENSIONS = 5;

// A tensor of 2-byte elements in global memory, and the box that one load brings into shared
// memory, swizzled by 128 bytes, zeros where it reaches outside. The fastest dimension comes first.
struct Tiling {
    const void* base;                          // at a multiple of 16 bytes
    std::uint64_t size[MAP_DIMENSIONS];        // elements
    std::uint64_t stride[MAP_DIMENSIONS - 1];  // bytes of each dimension but the first
    std::uint32_t box[MAP_DIMENSIONS];         // elements; 64 of the first, which fill 128 bytes
    int dimensions;                            // 2 or 5
    int dtype;                                 // bf16 or fp16
};

#ifdef REAP_HOST
struct alignas(128) Map {
    Tiling tiling;
};
#else
// As the driver encodes it.
struct alignas(128) Map {
    std::uint64_t words[16];
};
#endif

constexpr int MAP_BYTES = 128;
static_assert(sizeof(Map) == MAP_BYTES);

// Encodes a map, to be given to a kernel as a __grid_constant__ parameter or to be copied to global
// memory; the thread's current device is a Hopper. Returns a CUDA status: INVALID_VALUE where TMA
// cannot read the tensor.
int encode_map(const Tiling& tiling, Map* to);

}  // namespace reap
