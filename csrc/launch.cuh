// Launches: one call for CUDA and for the host, answering with a CUDA status.
#pragma once

#include <tuple>
#include <utility>

#include "device.cuh"
#include "kernels.h"

namespace reap {

constexpr int NO_CODE = 209;  // cudaErrorNoKernelImageForDevice

struct Grid {
    unsigned x = 1, y = 1;
};
struct Threads {
    unsigned x = 1, y = 1;
};

// The largest grid along x; along y it is 65535.
constexpr std::int64_t MOST_BLOCKS = (std::int64_t{1} << 31) - 1;

// A block gets more shared memory than this only where it asks the device.
constexpr unsigned COMMON_SHARED = 48u << 10;

// Makes a device current; its multiprocessors if it runs kernels for sm_90a, else 0.
inline int hopper_processors(int device) {
#ifdef __CUDACC__
    int major = 0, minor = 0, processors = 0;
    if (cudaSetDevice(device) != cudaSuccess ||
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
        return 0;
    return major == 9 && minor == 0 ? processors : 0;
#else
    (void)device;
    return 3;  // so that blocks have several tiles in tests
#endif
}

template <class... Params, class... Args>
int launch(void (*kernel)(Params...), Grid grid, Threads threads, unsigned shared, Where where,
           Args&&... args) {
#ifdef __CUDACC__
    // This module links its own runtime, whose current device is not torch's.
    if (const cudaError_t status = cudaSetDevice(where.device); status != cudaSuccess)
        return static_cast<int>(status);
    if (shared > COMMON_SHARED) {
        const cudaError_t status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                        cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                        static_cast<int>(shared));
        if (status != cudaSuccess) return static_cast<int>(status);
    }
    std::tuple<Params...> values(std::forward<Args>(args)...);
    const cudaError_t status = std::apply(
        [&](auto&... held) {
            void* pointers[] = {&held...};
            return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(grid.x, grid.y),
                                    dim3(threads.x, threads.y), pointers, shared,
                                    reinterpret_cast<cudaStream_t>(where.stream));
        },
        values);
    // Reported here, so that nobody meets it again later.
    if (status != cudaSuccess) cudaGetLastError();
    return static_cast<int>(status);
#else
    (void)where;
    return host::run({grid.x, grid.y, 1}, {threads.x, threads.y, 1}, shared,
                     [&] { kernel(static_cast<Params>(args)...); });
#endif
}

}  // namespace reap
