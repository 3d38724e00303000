// Fibers that take turns as the threads of CUDA blocks; see emulation.h.
#include "emulation.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

namespace reap::host {

dim3 thread_index, block_index, block_size, grid_size;

namespace {

constexpr int LANES = 32;
constexpr std::size_t STACK = 128 << 10;
constexpr std::size_t MOST_SHARED = 48 << 10;  // without asking a device for more
constexpr unsigned MOST_THREADS = 1024;

enum class State { ready, in_warp, in_block, done };

struct Fiber {
    ucontext_t context;
    jmp_buf resume;
    bool begun = false;
    std::vector<char> stack;
    dim3 index;
    unsigned number = 0;
    State state = State::done;
    const char* waits_for = "";
};

struct Warp {
    // Two sets, used in turn: lanes may give the next value while others still read this one.
    std::uint64_t values[2][LANES];
    unsigned rounds[LANES];
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
std::vector<unsigned char> shared;
const std::function<void()>* body = nullptr;
Fiber* running = nullptr;
jmp_buf scheduler;
ucontext_t scheduler_context;
std::mt19937 order;
bool permuted = false;

[[noreturn]] void fail(const char* why) {
    std::fprintf(stderr, "CUDA emulation: %s (block %u,%u thread %u,%u waits for %s)\n", why,
                 block_index.x, block_index.y, running ? running->index.x : 0,
                 running ? running->index.y : 0, running ? running->waits_for : "");
    std::abort();
}

// setjmp switches without a system call; AddressSanitizer follows only swapcontext.
#ifdef __SANITIZE_ADDRESS__
constexpr bool KEEP_SIGNALS = true;
#else
constexpr bool KEEP_SIGNALS = false;
#endif

void yield() {
    Fiber* const self = running;
    if constexpr (KEEP_SIGNALS) {
        swapcontext(&self->context, &scheduler_context);
    } else if (_setjmp(self->resume) == 0) {
        _longjmp(scheduler, 1);
    }
}

// A fiber outlives its block: it runs the body once per block, and then waits for the next.
void fiber_main() {
    for (;;) {
        (*body)();
        running->state = State::done;
        yield();
    }
}

void begin(Fiber& fiber) {
    fiber.stack.resize(STACK);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
}

void resume(Fiber& fiber) {
    running = &fiber;
    thread_index = fiber.index;
    if constexpr (KEEP_SIGNALS) {
        if (!fiber.begun) begin(fiber);
        fiber.begun = true;
        swapcontext(&scheduler_context, &fiber.context);
    } else if (_setjmp(scheduler) == 0) {
        if (fiber.begun) _longjmp(fiber.resume, 1);
        begin(fiber);
        fiber.begun = true;
        setcontext(&fiber.context);
    }
    running = nullptr;
}

// Releases lanes that have all come to the same place; threads that have returned do not count.
bool release(unsigned first, unsigned last, State waiting) {
    const char* what = nullptr;
    bool any = false;
    for (unsigned i = first; i < last; ++i) {
        const Fiber& fiber = *fibers[i];
        if (fiber.state == State::done && waiting == State::in_block) continue;
        if (fiber.state != waiting) return false;
        if (what != nullptr && what != fiber.waits_for) {
            running = fibers[i].get();
            fail("lanes of one warp have come to different places");
        }
        what = waiting == State::in_warp ? fiber.waits_for : nullptr;
        any = true;
    }
    for (unsigned i = first; any && i < last; ++i)
        if (fibers[i]->state == waiting) fibers[i]->state = State::ready;
    return any;
}

void run_block(unsigned threads) {
    std::fill(shared.begin(), shared.end(), 0xff);
    for (Warp& warp : warps) std::fill(std::begin(warp.rounds), std::end(warp.rounds), 0);
    for (unsigned i = 0; i < threads; ++i) fibers[i]->state = State::ready;
    std::vector<unsigned> turn(threads);
    std::iota(turn.begin(), turn.end(), 0);
    for (;;) {
        if (permuted) std::shuffle(turn.begin(), turn.end(), order);
        bool moved = false;
        for (const unsigned i : turn) {
            if (fibers[i]->state != State::ready) continue;
            resume(*fibers[i]);
            moved = true;
        }
        for (unsigned w = 0; w < threads / LANES; ++w)
            moved |= release(w * LANES, (w + 1) * LANES, State::in_warp);
        moved |= release(0, threads, State::in_block);
        if (!moved) break;
    }
    for (unsigned i = 0; i < threads; ++i) {
        if (fibers[i]->state == State::done) continue;
        running = fibers[i].get();
        fail("threads wait for others that never come");
    }
}

}  // namespace

int run(dim3 grid, dim3 block, std::size_t bytes, const std::function<void()>& kernel) {
    const unsigned threads = block.x * block.y * block.z;
    const std::uint64_t blocks = std::uint64_t{grid.x} * grid.y * grid.z;
    // What cudaLaunchKernel refuses: 9 is cudaErrorInvalidConfiguration, 1 an invalid value.
    if (!blocks || !threads || threads > MOST_THREADS || grid.y > 65535) return 9;
    if (bytes > MOST_SHARED || threads % LANES) return 1;
    for (unsigned i = static_cast<unsigned>(fibers.size()); i < threads; ++i)
        fibers.push_back(std::make_unique<Fiber>());
    for (unsigned i = 0; i < threads; ++i) {
        fibers[i]->number = i;
        fibers[i]->index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
    }
    warps.assign(threads / LANES, Warp{});
    shared.assign(bytes, 0xff);
    block_size = block;
    grid_size = grid;
    body = &kernel;
    std::vector<std::uint64_t> turn(blocks);
    std::iota(turn.begin(), turn.end(), 0);
    if (permuted) std::shuffle(turn.begin(), turn.end(), order);
    for (const std::uint64_t b : turn) {
        block_index = {static_cast<unsigned>(b % grid.x),
                       static_cast<unsigned>(b / grid.x % grid.y),
                       static_cast<unsigned>(b / grid.x / grid.y)};
        run_block(threads);
    }
    return 0;
}

void set_order(unsigned seed) {
    permuted = seed != 0;
    order.seed(seed);
}

void* shared_memory() { return shared.data(); }

void wait_for_block() {
    running->state = State::in_block;
    running->waits_for = "__syncthreads";
    yield();
}

void wait_for_warp(const char* what) {
    running->state = State::in_warp;
    running->waits_for = what;
    yield();
}

const std::uint64_t* exchange(const char* what, std::uint64_t value) {
    Warp& warp = warps[running->number / LANES];
    const unsigned set = warp.rounds[lane()]++ % 2;
    warp.values[set][lane()] = value;
    wait_for_warp(what);
    return warp.values[set];
}

int lane() { return static_cast<int>(running->number % LANES); }

}  // namespace reap::host
