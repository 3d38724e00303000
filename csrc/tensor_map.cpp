// Encodes tensor maps: by the driver, which is asked for the function so that nothing links to it.
#include "tensor_map.h"

#include "kernels.h"

#ifndef REAP_HOST
#include <cuda.h>
#include <cuda_runtime_api.h>
#endif

namespace reap {
namespace {

constexpr std::uint64_t ALIGNED = 16, MOST_STRIDE = std::uint64_t{1} << 40;
constexpr std::uint64_t MOST_SIZE = std::uint64_t{1} << 32;
constexpr std::uint32_t MOST_BOX = 256, FASTEST = 64;

// What the driver asks of a map with a swizzle of 128 bytes.
bool encodable(const Tiling& tiling) {
    const bool half = tiling.dtype == static_cast<int>(Dtype::bf16) ||
                      tiling.dtype == static_cast<int>(Dtype::fp16);
    if (!half || tiling.base == nullptr || tiling.box[0] != FASTEST || tiling.dimensions < 2 ||
        tiling.dimensions > MAP_DIMENSIONS ||
        reinterpret_cast<std::uintptr_t>(tiling.base) % ALIGNED)
        return false;
    for (int i = 0; i < tiling.dimensions; ++i) {
        if (tiling.size[i] < 1 || tiling.size[i] > MOST_SIZE) return false;
        if (tiling.box[i] < 1 || tiling.box[i] > MOST_BOX) return false;
        if (i == 0) continue;
        const std::uint64_t stride = tiling.stride[i - 1];
        if (stride == 0 || stride % ALIGNED || stride >= MOST_STRIDE) return false;
    }
    return true;
}

}  // namespace

#ifdef REAP_HOST

int encode_map(const Tiling& tiling, Map* to) {
    if (!encodable(tiling)) return INVALID_VALUE;
    to->tiling = tiling;
    return SUCCESS;
}

#else

namespace {

// CUDA 12 aligns its own to 64 bytes, CUDA 13 to 128.
static_assert(sizeof(Map) == sizeof(CUtensorMap) && alignof(Map) >= alignof(CUtensorMap));

using Encode = decltype(&cuTensorMapEncodeTiled);

// Null where the driver is older than CUDA 12.0.
Encode find_encode() {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                                12000, cudaEnableDefault, &result);
    if (status != cudaSuccess || result != cudaDriverEntryPointSuccess) return nullptr;
    return reinterpret_cast<Encode>(found);
}

}  // namespace

int encode_map(const Tiling& tiling, Map* to) {
    static const Encode encode = find_encode();
    if (encode == nullptr) return static_cast<int>(cudaErrorInsufficientDriver);
    if (!encodable(tiling)) return INVALID_VALUE;
    const bool bf16 = tiling.dtype == static_cast<int>(Dtype::bf16);
    const cuuint32_t steps[MAP_DIMENSIONS] = {1, 1, 1, 1, 1};
    cuuint64_t size[MAP_DIMENSIONS], stride[MAP_DIMENSIONS - 1];
    for (int i = 0; i < tiling.dimensions; ++i) {
        size[i] = tiling.size[i];
        if (i) stride[i - 1] = tiling.stride[i - 1];
    }
    // CUresult's numbers are those of cudaError_t where both have an error.
    return static_cast<int>(
        encode(reinterpret_cast<CUtensorMap*>(to),
               bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
               static_cast<cuuint32_t>(tiling.dimensions), const_cast<void*>(tiling.base), size,
               stride, tiling.box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
}

#endif

}  // namespace reap
