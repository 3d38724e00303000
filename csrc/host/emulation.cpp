// Fibers that take turns as the threads of CUDA blocks; see emulation.h.
#include "emulation.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

namespace reap::host {

dim3 thread_index, block_index, block_size, grid_size;

namespace {

constexpr unsigned LANES = 32;
constexpr std::size_t STACK = 128 << 10;
constexpr std::size_t SHARED_ALIGNMENT = 1024;
constexpr unsigned MOST_THREADS = 1024;
// How often, in turns, someone else comes first, and how often a thread lets others overtake it.
constexpr unsigned NEW_LEADER = 64;
constexpr unsigned OVERTAKEN = 8;

enum class State { ready, in_warp, in_block, conditional, done };

struct Fiber {
    ucontext_t context;
    jmp_buf resume;
    bool begun = false;
    std::vector<char> stack;
    dim3 index;
    unsigned number = 0;
    State state = State::done;
    const char* waits_for = "";
    const Condition* condition = nullptr;  // of State::conditional
};

struct Warp {
    // Two sets, used in turn: lanes may give the next value while others still read this one.
    std::uint64_t values[2][LANES];
    unsigned rounds[LANES];
};

// Who moves first: everyone in turn, or a warp or a thread for as long as it can.
enum class Turns { natural, everyone, a_warp, a_thread };

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
std::vector<unsigned char> shared_buffer;
unsigned char* shared_begin = nullptr;
std::size_t shared_size = 0;
std::vector<std::function<void()>> work;  // that goes on beside the threads
const std::function<void()>* body = nullptr;
Fiber* running = nullptr;
unsigned returned = 0;  // threads of the block that have
jmp_buf scheduler;
ucontext_t scheduler_context;
std::mt19937 order;
Turns turns = Turns::natural;

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
        ++returned;
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

// Gives the fiber its turn, if it can move.
bool move(Fiber& fiber) {
    if (fiber.state == State::conditional && fiber.condition->holds()) fiber.state = State::ready;
    if (fiber.state != State::ready) return false;
    resume(fiber);
    return true;
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

bool release_warps(unsigned first, unsigned last) {
    bool moved = false;
    for (unsigned w = first; w < last; ++w)
        moved |= release(w * LANES, (w + 1) * LANES, State::in_warp);
    return moved;
}

// Does one piece of the work beside the threads.
bool work_on() {
    if (work.empty()) return false;
    const std::size_t which = drawn(static_cast<unsigned>(work.size()));
    const std::function<void()> piece = std::move(work[which]);
    work.erase(work.begin() + static_cast<std::ptrdiff_t>(which));
    piece();
    return true;
}

// One round in which everyone has a turn. In the natural order, work beside the threads is done as
// late as possible.
bool round_of_everyone(std::vector<unsigned>& turn, unsigned threads) {
    if (turns == Turns::everyone) std::shuffle(turn.begin(), turn.end(), order);
    bool moved = false;
    for (const unsigned i : turn)
        moved |= i == threads ? turns == Turns::everyone && work_on() : move(*fibers[i]);
    moved |= release_warps(0, threads / LANES);
    return moved | release(0, threads, State::in_block);
}

// A turn of the first in `turn` who can move: a warp or a thread, or the work beside them.
bool turn_of_the_first(std::vector<unsigned>& turn, unsigned threads) {
    const unsigned size = turns == Turns::a_warp ? LANES : 1;
    if (drawn(NEW_LEADER) == 0) std::shuffle(turn.begin(), turn.end(), order);
    for (const unsigned unit : turn) {
        const unsigned first = unit * size;
        if (first == threads) {
            if (work_on()) return true;
            continue;
        }
        bool moved = false;
        for (unsigned i = first; i < first + size; ++i) moved |= move(*fibers[i]);
        if (!moved) continue;
        release_warps(first / LANES, first / LANES + 1);
        release(0, threads, State::in_block);
        return true;
    }
    return false;
}

// "0-31, 64": where each number is of a sorted list.
std::string ranges(const std::vector<unsigned>& numbers) {
    std::string text;
    for (std::size_t i = 0; i < numbers.size();) {
        std::size_t last = i;
        while (last + 1 < numbers.size() && numbers[last + 1] == numbers[last] + 1) ++last;
        if (!text.empty()) text += ", ";
        text += std::to_string(numbers[i]);
        if (last > i) text += '-';
        if (last > i) text += std::to_string(numbers[last]);
        i = last + 1;
    }
    return text;
}

std::string purpose(const Fiber& fiber) {
    return fiber.state == State::conditional ? fiber.condition->text() : fiber.waits_for;
}

// Fails if some threads have not returned.
void expect_done(unsigned threads) {
    std::map<std::string, std::vector<unsigned>> waiting;
    for (unsigned i = 0; i < threads; ++i)
        if (fibers[i]->state != State::done) waiting[purpose(*fibers[i])].push_back(i);
    if (waiting.empty()) return;
    std::string text = "threads wait for others that never come";
    for (const auto& [what, who] : waiting) {
        text += "\n  ";
        text += who.size() == 1 ? "thread " : "threads ";
        text += ranges(who) + ": " + what;
    }
    fail(text);
}

void run_block(unsigned threads) {
    std::fill(shared_begin, shared_begin + shared_size, 0xff);
    for (Warp& warp : warps) std::fill(std::begin(warp.rounds), std::end(warp.rounds), 0);
    for (unsigned i = 0; i < threads; ++i) fibers[i]->state = State::ready;
    work.clear();
    returned = 0;
    begin_hopper(threads);
    const bool each = turns == Turns::natural || turns == Turns::everyone;
    // One number more than there are: the work beside the threads.
    std::vector<unsigned> turn(1 + threads / (turns == Turns::a_warp ? LANES : 1));
    std::iota(turn.begin(), turn.end(), 0);
    if (!each) std::shuffle(turn.begin(), turn.end(), order);
    for (bool moved = true; moved;) {
        moved = each ? round_of_everyone(turn, threads) : turn_of_the_first(turn, threads);
        if (returned == threads && !work.empty()) fail("a block ends before copies that it began");
        moved = moved || work_on();
    }
    expect_done(threads);
    end_hopper();
}

}  // namespace

void fail(const std::string& why) {
    std::fprintf(stderr, "CUDA emulation: %s (block %u,%u", why.c_str(), block_index.x,
                 block_index.y);
    if (running) std::fprintf(stderr, " thread %u,%u", running->index.x, running->index.y);
    if (running && running->state != State::ready)
        std::fprintf(stderr, " waits for %s", purpose(*running).c_str());
    std::fprintf(stderr, ")\n");
    std::abort();
}

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
    shared_buffer.resize(bytes + SHARED_ALIGNMENT);
    void* start = shared_buffer.data();
    std::size_t space = shared_buffer.size();
    shared_begin = static_cast<unsigned char*>(std::align(SHARED_ALIGNMENT, bytes, start, space));
    shared_size = bytes;
    block_size = block;
    grid_size = grid;
    body = &kernel;
    std::vector<std::uint64_t> turn(blocks);
    std::iota(turn.begin(), turn.end(), 0);
    if (turns != Turns::natural) std::shuffle(turn.begin(), turn.end(), order);
    for (const std::uint64_t b : turn) {
        block_index = {static_cast<unsigned>(b % grid.x),
                       static_cast<unsigned>(b / grid.x % grid.y),
                       static_cast<unsigned>(b / grid.x / grid.y)};
        run_block(threads);
    }
    return 0;
}

void set_order(unsigned seed) {
    constexpr Turns OTHERS[] = {Turns::a_thread, Turns::everyone, Turns::a_warp};
    turns = seed == 0 ? Turns::natural : OTHERS[seed % 3];
    order.seed(seed);
}

void* shared_memory() { return shared_begin; }

std::size_t shared_bytes() { return shared_size; }

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

void wait_until(const Condition& condition) {
    if (condition.holds()) return may_yield();
    running->condition = &condition;
    running->state = State::conditional;
    yield();
}

void may_yield() {
    if (turns != Turns::natural && drawn(OVERTAKEN) == 0) yield();
}

void later(std::function<void()> piece) { work.push_back(std::move(piece)); }

unsigned drawn(unsigned n) {
    return turns == Turns::natural ? 0 : static_cast<unsigned>(order() % n);
}

const std::uint64_t* exchange(const char* what, std::uint64_t value) {
    Warp& warp = warps[running->number / LANES];
    const unsigned set = warp.rounds[lane()]++ % 2;
    warp.values[set][lane()] = value;
    wait_for_warp(what);
    return warp.values[set];
}

int lane() { return static_cast<int>(running->number % LANES); }

unsigned thread_number() { return running->number; }

}  // namespace reap::host
