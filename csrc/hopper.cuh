// What kernels for Hopper (sm_90a) say beyond CUDA C++: mbarriers, TMA, cp.async, wgmma, stmatrix.
//
// Under nvcc the words are PTX; on the CPU host/hopper.h runs the same words.
// Kernels are compiled for every architecture, but have code only where HOPPER is true.
//
// Stages of shared memory are guarded by two mbarriers each, `full` and `empty`. A wait names the
// parity of the phase that must be over: 0, 1, 0, ... as a stage is used again and again.
#pragma once

#include "tensor_map.h"
#include "types.cuh"

namespace reap {

// Floats of a thread's accumulator, of which a product of width N uses N / 2.
constexpr int ACCUMULATOR = 128;

}  // namespace reap

#ifndef __CUDACC__

#include "host/hopper.h"

#else

#include "wgmma.cuh"

namespace reap {

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool HOPPER = true;
#else
constexpr bool HOPPER = false;
#endif

// Ends the launch with an error: a kernel without code must not pass for one that ran.
REAP_DEVICE void refuse_to_run() { __trap(); }

REAP_DEVICE std::uint32_t shared_address(const void* at) {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(at));
}

// mbarriers. One phase is over after `count` arrivals and all bytes that were announced.
REAP_DEVICE void barrier_init(std::uint64_t* barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(count));
}
// After every barrier_init, before the block's barrier: the async proxy sees the barriers.
REAP_DEVICE void barriers_ready() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
REAP_DEVICE void barrier_arrive(std::uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
                 : "memory");
}
// Arrives, and announces bytes that TMA loads will bring.
REAP_DEVICE void barrier_expect(std::uint64_t* barrier, std::uint32_t bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
        "r"(bytes)
        : "memory");
}
// Arrives once all copies of `copy16` that this thread has asked for have landed.
REAP_DEVICE void barrier_arrive_copies(std::uint64_t* barrier) {
    asm volatile(
        "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier))
        : "memory");
}
REAP_DEVICE void barrier_wait(std::uint64_t* barrier, unsigned parity) {
    asm volatile(
        "{\n"
        ".reg .pred over;\n"
        "AGAIN:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
        "@over bra DONE;\n"
        "bra AGAIN;\n"
        "DONE:\n"
        "}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// cp.async: 16 bytes, the last 16 - `bytes` of them zeros that are not read.
REAP_DEVICE void copy16(void* to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes)
                 : "memory");
}

// TMA: the box of a tensor map that begins at the given coordinates, the fastest first. Every box
// brings all its bytes to the barrier, zeros for what lies outside the tensor.
REAP_DEVICE void tma_load_2d(void* to, const Map* map, std::uint64_t* barrier, int x, int y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
        : "memory");
}
REAP_DEVICE void tma_load_5d(void* to, const Map* map, std::uint64_t* barrier, int x, int y, int z,
                             int v, int w) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "r"(v), "r"(w)
        : "memory");
}
// Before the first load by a map that lies in global memory. The host has copied it there, hence
// the scope of the system.
REAP_DEVICE void acquire_map(const Map* map) {
    asm volatile("fence.proxy.tensormap::generic.acquire.sys [%0], 128;" ::"l"(map) : "memory");
}

// What copy16 has written, and a barrier has handed over, becomes visible to wgmma.
REAP_DEVICE void generic_writes_to_async_reads() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// wgmma. Products of a warp group run by themselves between `products_begin` and the wait for their
// group; until then nobody may write what they read, nor touch the accumulator.
REAP_DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
REAP_DEVICE void products_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int LEFT>
REAP_DEVICE void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
// No move of the accumulator past this point.
template <int N>
REAP_DEVICE void keep(float (&d)[ACCUMULATOR]) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
// Descriptor of rows of 128 bytes whose 16-byte chunks TMA's 128-byte swizzle has moved: chunk c of
// row r lies at c ^ (r % 8). 8 rows are 1024 bytes, at a multiple of 1024.
REAP_DEVICE std::uint64_t matrix(const void* at) {
    return (std::uint64_t{1} << 62) | (std::uint64_t{1024 >> 4} << 32) | (std::uint64_t{1} << 16) |
           ((shared_address(at) >> 4) & 0x3fff);
}
// d (64 x N, + if `add`) = A (64 x 16) B (16 x N), by descriptors. Thread t of the group holds rows
// t / 32 * 16 + t % 32 / 4 (+ 8) and columns 8 j + t % 4 * 2 (+ 1):
// d[4 j + 2 * (the + 8) + (the + 1)].
template <class T, int N>
REAP_DEVICE void product(float (&d)[ACCUMULATOR], std::uint64_t a, std::uint64_t b, bool add) {
    multiply_add<T, N>(d, a, b, add);
}

// stmatrix: four 8 x 8 matrices, each transposed; lane l gives the address of row l % 8 of matrix
// l / 8, and m[i] holds elements (l % 4 * 2, + 1) of column l / 4 of matrix i.
REAP_DEVICE void store_transposed(void* row, const std::uint32_t (&m)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     shared_address(row)),
                 "r"(m[0]), "r"(m[1]), "r"(m[2]), "r"(m[3])
                 : "memory");
}

// A barrier of one warp group; `id` from 1 to 15 is its own.
REAP_DEVICE void group_sync(int id) { asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory"); }

// Two elements, rounded to nearest.
template <class T>
REAP_DEVICE std::uint32_t pack(float low, float high);
template <>
REAP_DEVICE std::uint32_t pack<bf16>(float low, float high) {
    std::uint32_t out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}
template <>
REAP_DEVICE std::uint32_t pack<fp16>(float low, float high) {
    std::uint32_t out;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}

// NaN of NaN, unlike fminf and fmaxf.
REAP_DEVICE float at_most(float x, float limit) {
    float out;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(x), "f"(limit));
    return out;
}
REAP_DEVICE float at_least(float x, float limit) {
    float out;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(x), "f"(limit));
    return out;
}
// x / (1 + exp(-z)). __expf is off by 2 + 1.2 |z| units in its last place: far less than what
// rounding to 16 bits costs.
REAP_DEVICE float times_sigmoid(float x, float z) { return __fdividef(x, 1.0f + __expf(-z)); }

// Registers of each thread of a warp group, from the pool of the block.
template <int REGISTERS>
REAP_DEVICE void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
REAP_DEVICE void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

}  // namespace reap

#endif
