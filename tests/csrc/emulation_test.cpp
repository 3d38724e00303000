// Kernels that are wrong on purpose, each in a way the emulation must show; the argument picks one.
#include <cstdio>
#include <cstring>

#include "launch.cuh"
#include "warp.cuh"

using namespace reap;

__global__ void race(int* out) {
    REAP_SHARED(int, last);
    last[0] = static_cast<int>(threadIdx.x);
    __syncthreads();
    if (threadIdx.x == 0) out[0] = last[0];
}

__global__ void missing_barrier(int* out) {
    REAP_SHARED(int, values);
    values[threadIdx.x] = static_cast<int>(threadIdx.x);
    out[threadIdx.x] = values[63 - threadIdx.x];
}

__global__ void unwritten(unsigned* out) {
    REAP_SHARED(unsigned, value);
    out[threadIdx.x] = value[threadIdx.x];
}

__global__ void lost_lanes(int* out) {
    if (threadIdx.x % WARP < 16) out[threadIdx.x] = warp_reduce(1, Sum{});
}

__global__ void parted_lanes(int* out) {
    if (threadIdx.x % WARP < 16) {
        out[threadIdx.x] = __shfl_xor_sync(ALL_LANES, 1, 1);
    } else {
        __syncwarp();
    }
}

__global__ void lost_threads(int* out) {
    if (threadIdx.x < 32)
        __syncwarp();
    else
        return;
    if (threadIdx.x == 0) __syncthreads();
    out[0] = static_cast<int>(warp_reduce(1, Sum{}));
}

__global__ void right(int* out) {
    const int lane = threadIdx.x % WARP;
    int rows[8];
    for (int i = 0; i < 8; ++i) rows[i] = i * 1000 + lane;
    out[threadIdx.x] = warp_reduce_rows<8>(rows, lane, Sum{});
}

int main(int argc, char** argv) {
    if (argc != 3) return 2;
    const char* const which = argv[1];
    host::set_order(static_cast<unsigned>(std::atoi(argv[2])));
    int out[64] = {};
    const auto is = [&](const char* name) { return std::strcmp(which, name) == 0; };
    const auto go = [&](auto kernel, unsigned shared) {
        return launch(kernel, Grid{1}, Threads{64}, shared, Where{}, out);
    };
    int status = 2;
    if (is("race")) status = go(race, 4);
    if (is("missing_barrier")) status = go(missing_barrier, 256);
    if (is("lost_lanes")) status = go(lost_lanes, 0);
    if (is("parted_lanes")) status = go(parted_lanes, 0);
    if (is("lost_threads")) status = go(lost_threads, 0);
    if (is("right")) status = go(right, 0);
    if (is("too_much_shared")) status = go(race, 228 << 10);
    if (is("unwritten"))
        status =
            launch(unwritten, Grid{1}, Threads{64}, 256, Where{}, reinterpret_cast<unsigned*>(out));
    if (is("too_many_threads")) status = launch(right, Grid{1}, Threads{1056}, 0, Where{}, out);
    for (const int value : out) std::printf("%d ", value);
    return status;
}
