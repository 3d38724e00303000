// The words of hopper.cuh on the CPU: what Hopper does beside its threads, as late as it may be.
//
// Three things are modeled that a run on a GPU may happen not to show:
//
// - Copies (TMA, cp.async) land at a time that the order of turns chooses, and a product reads its
//   operands and its accumulator when it is committed or when it is waited for, as the order says.
// - Shared memory has two views. Threads write one; products read the other, to which writes of
//   threads and of cp.async come by generic_writes_to_async_reads alone, and those of TMA at once.
//   Of threads' own writes only those of this file's functions are followed.
// - Waits are a thread's own: at its turn, it asks whether the barrier is in the other phase now. A
//   phase that comes and goes between two of its turns is missed, as on the GPU.
//
// Misuse (a barrier that nobody began, more arrivals than it expects, an operand outside shared
// memory, lanes that issue different products, copies that nobody waits for, more registers than a
// block has) ends the process with a message.
#pragma once

#include <cmath>
#include <cstdint>

#include "../tensor_map.h"
#include "../types.cuh"
#include "emulation.h"

#define __grid_constant__

namespace reap {

constexpr bool HOPPER = true;

[[noreturn]] inline void refuse_to_run() { host::fail("a kernel without code runs"); }

void barrier_init(std::uint64_t* barrier, int count);
void barriers_ready();
void barrier_expect(std::uint64_t* barrier, std::uint32_t bytes);
void barrier_arrive(std::uint64_t* barrier);
void barrier_arrive_copies(std::uint64_t* barrier);
void barrier_wait(std::uint64_t* barrier, unsigned phase);
// bar.sync of one warp group.
void group_sync(int id);

// The last 16 - `bytes` of 16 become zeros.
void copy16(void* to, const void* from, int bytes);
void generic_writes_to_async_reads();
// One 8 x 8 matrix of 16-bit elements per eight lanes, transposed: stmatrix.x4.trans.
void store_transposed(void* row, const std::uint32_t (&matrices)[4]);

namespace host {

void tma_load(void* to, const Map& map, std::uint64_t* barrier, const int* at, int rank);
void product(float* sum, int columns, Dtype dtype, std::uint64_t a, std::uint64_t b, bool add);
void products_wait(int left);
void set_registers(unsigned registers);

template <class T>
constexpr Dtype DTYPE_OF = Dtype::fp32;
template <>
constexpr Dtype DTYPE_OF<bf16> = Dtype::bf16;
template <>
constexpr Dtype DTYPE_OF<fp16> = Dtype::fp16;

}  // namespace host

inline void tma_load_2d(void* to, const Map* map, std::uint64_t* barrier, int x, int y) {
    const int at[] = {x, y};
    host::tma_load(to, *map, barrier, at, 2);
}
inline void tma_load_5d(void* to, const Map* map, std::uint64_t* barrier, int x, int y, int z,
                        int v, int w) {
    const int at[] = {x, y, z, v, w};
    host::tma_load(to, *map, barrier, at, 5);
}

// Emulated blocks run one after another, in one memory: every map is visible.
inline void acquire_map(const Map*) {}

// The descriptor of an operand whose rows are 128 bytes, swizzled, in groups of eight.
std::uint64_t matrix(const void* start);
void products_begin();
void products_commit();
template <int LEFT>
void products_wait() {
    host::products_wait(LEFT);
}
template <int N>
void keep(float (&)[ACCUMULATOR]) {}
// sum[64 x N] (+)= a[64 x 16] b[N x 16]^T; the calling warp group's part of each thread.
template <class T, int N>
void product(float (&sum)[ACCUMULATOR], std::uint64_t a, std::uint64_t b, bool add) {
    static_assert(host::DTYPE_OF<T> != Dtype::fp32 && N % 8 == 0 && N >= 8 && N <= 256);
    host::product(sum, N, host::DTYPE_OF<T>, a, b, add);
}

template <class T>
std::uint32_t pack(float low, float high) {
    T first, second;
    narrow(low, first);
    narrow(high, second);
    return first.bits | std::uint32_t{second.bits} << 16;
}

// NaN of NaN.
inline float at_most(float x, float limit) { return x > limit ? limit : x; }
inline float at_least(float x, float limit) { return x < limit ? limit : x; }
inline float times_sigmoid(float x, float z) { return x / (1.0f + std::exp(-z)); }

template <int REGISTERS>
void fewer_registers() {
    static_assert(REGISTERS % 8 == 0 && REGISTERS >= 24 && REGISTERS <= 256);
    host::set_registers(REGISTERS);
}
template <int REGISTERS>
void more_registers() {
    fewer_registers<REGISTERS>();
}

}  // namespace reap
