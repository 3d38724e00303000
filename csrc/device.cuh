// What kernels are written in: CUDA under nvcc; elsewhere the same words, run on the CPU.
#pragma once

#include <cstdint>

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define REAP_DEVICE __device__ __forceinline__
#define REAP_BOTH __host__ __device__ constexpr
// The one block of shared memory a kernel has; its size is given at launch.
#define REAP_SHARED(type, name)                              \
    extern __shared__ __align__(16) unsigned char memory_[]; \
    type* const name = reinterpret_cast<type*>(memory_)

#else

#include "host/emulation.h"

#define REAP_DEVICE inline
#define REAP_BOTH constexpr
#define REAP_SHARED(type, name) type* const name = static_cast<type*>(reap::host::shared_memory())

#endif

namespace reap {

REAP_BOTH std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

}  // namespace reap
