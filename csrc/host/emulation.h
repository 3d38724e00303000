// The words of CUDA that our kernels use, run on the CPU by one thread, for tests.
//
// Each CUDA thread is a fiber. It runs until it meets others (a barrier, a shuffle), where it waits
// until all of its warp or block have come, or until a condition of its own holds, which is asked
// again at each of its turns. Fibers and blocks take turns in an order that a seed permutes: a
// kernel whose result depends on it has a race. Misuse that hangs or corrupts on a GPU (a shuffle
// some lanes do not reach, more shared memory than there is) ends the process with a message, which
// says who waits for what. Shared memory is filled with ones before each block, so that reads of
// unwritten memory show. What only Hopper has is in hopper.h.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#define __global__
#define __device__
#define __launch_bounds__(...)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

namespace reap::host {

// Of the thread that runs; kernels read them as threadIdx, blockIdx, blockDim, gridDim.
extern dim3 thread_index, block_index, block_size, grid_size;

// Bytes of shared memory that a block of Hopper may ask for.
constexpr std::size_t MOST_SHARED = 227 << 10;

// Runs `body` for every thread of every block; returns a CUDA status.
int run(dim3 grid, dim3 block, std::size_t shared, const std::function<void()>& body);

// Another order of threads and blocks for later launches; 0 is the natural one. The others differ
// in who moves first: 1, 4, 7, ... give every thread one turn in each round, 2, 5, 8, ... let one
// warp run as far as it can before any other, and 3, 6, 9, ... do so with one thread.
void set_order(unsigned seed);

// Begins at a multiple of 1,024 bytes.
void* shared_memory();
std::size_t shared_bytes();
void wait_for_block();
void wait_for_warp(const char* what);

// What one thread waits for.
struct Condition {
    virtual ~Condition() = default;
    virtual bool holds() const = 0;
    virtual std::string text() const = 0;
};
void wait_until(const Condition& condition);

// A place where others may overtake the thread; in some orders they do.
void may_yield();
// Work of the block that goes on beside its threads; the order says when it is done.
void later(std::function<void()> work);
// 0 to n - 1 by the order; 0 in the natural one.
unsigned drawn(unsigned n);
// Ends the process with a message.
[[noreturn]] void fail(const std::string& why);

unsigned thread_number();  // in the block

// Of hopper.cpp: its state at a block's start, and whether all it began is finished at the end.
void begin_hopper(unsigned threads);
void end_hopper();
// One value of each lane of the warp, once all have given theirs.
const std::uint64_t* exchange(const char* what, std::uint64_t value);
int lane();

template <class T>
T shuffled(const char* what, T value, int from) {
    static_assert(sizeof(T) <= sizeof(std::uint64_t));
    std::uint64_t bits = 0;
    __builtin_memcpy(&bits, &value, sizeof(T));
    const std::uint64_t found = exchange(what, bits)[from];
    __builtin_memcpy(&value, &found, sizeof(T));
    return value;
}

}  // namespace reap::host

#define threadIdx reap::host::thread_index
#define blockIdx reap::host::block_index
#define blockDim reap::host::block_size
#define gridDim reap::host::grid_size

inline void __syncthreads() { reap::host::wait_for_block(); }
inline void __syncwarp() { reap::host::wait_for_warp("__syncwarp"); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int bit) {
    return reap::host::shuffled("__shfl_xor_sync", value, reap::host::lane() ^ bit);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int step) {
    const int lane = reap::host::lane();
    return reap::host::shuffled("__shfl_up_sync", value, lane < step ? lane : lane - step);
}
template <class T>
T __shfl_sync(unsigned, T value, int from) {
    return reap::host::shuffled("__shfl_sync", value, from);
}
inline unsigned __match_any_sync(unsigned, int value) {
    const std::uint64_t* all =
        reap::host::exchange("__match_any_sync", static_cast<unsigned>(value));
    unsigned equal = 0;
    for (int lane = 0; lane < 32; ++lane)
        equal |= static_cast<unsigned>(all[lane] == static_cast<unsigned>(value)) << lane;
    return equal;
}
inline unsigned __ballot_sync(unsigned, bool value) {
    const std::uint64_t* all = reap::host::exchange("__ballot_sync", value);
    unsigned set = 0;
    for (int lane = 0; lane < 32; ++lane) set |= static_cast<unsigned>(all[lane]) << lane;
    return set;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
