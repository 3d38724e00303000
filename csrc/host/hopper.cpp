// Barriers, copies and products of Hopper, emulated; see hopper.h.
#include "../hopper.cuh"

#include <algorithm>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace reap {
namespace {

using host::fail;

constexpr unsigned LANES = 32;
constexpr unsigned GROUP = 128;                     // threads of a warp group
constexpr std::uint64_t BEGUN = 0x6d626172726965;   // what a barrier's bytes hold
constexpr std::int64_t MOST_BYTES = (1 << 20) - 1;  // that a phase of a barrier can expect
constexpr std::size_t MOST_REGISTERS = 1 << 16;     // of a multiprocessor
constexpr unsigned NAMED = 16;                      // barriers of bar.sync

struct Barrier {
    int expected = 0, pending = 0;
    std::int64_t bytes = 0;
    unsigned phase = 0;
    bool ready = false;  // for TMA, which sees no initialization before its fence
};

struct Copy {
    unsigned char* to;
    const void* from;
    std::size_t bytes;
};

struct Product {
    float* sum;
    int columns;
    Dtype dtype;
    std::uint64_t a, b;
    bool add;

    bool same(const Product& other) const {
        return columns == other.columns && dtype == other.dtype && a == other.a && b == other.b &&
               add == other.add;
    }
};

struct Thread {
    std::vector<Copy> copies;
    std::vector<Product> products;    // not yet done
    std::vector<std::size_t> groups;  // committed: how many products each has
    std::size_t open = 0;             // products of the group that is not committed
    bool fenced = false;
    std::uint64_t issued = 0;  // how many products, ever
    unsigned registers = 0;    // as set by the thread; 0: as at the launch
};

struct Named {
    unsigned arrived = 0, generation = 0;
};

std::map<std::size_t, Barrier> barriers;  // by offset in shared memory
Named named[NAMED];
std::vector<Thread> threads;
std::vector<unsigned char> seen;                          // shared memory as products see it
std::vector<std::pair<std::size_t, std::size_t>> unseen;  // offsets and bytes written since

unsigned char* memory() { return static_cast<unsigned char*>(host::shared_memory()); }

std::size_t offset(const void* pointer, std::size_t bytes, const char* what) {
    const auto at = reinterpret_cast<std::uintptr_t>(pointer);
    const auto start = reinterpret_cast<std::uintptr_t>(memory());
    if (at < start || at + bytes > start + host::shared_bytes())
        fail(std::string(what) + " outside shared memory");
    return at - start;
}

Thread& self() { return threads[host::thread_number()]; }

std::vector<unsigned char>& products_view() {
    if (seen.empty()) seen.assign(host::shared_bytes(), 0xff);
    return seen;
}

Barrier& at(const std::uint64_t* pointer) {
    const auto found = barriers.find(offset(pointer, sizeof *pointer, "an mbarrier"));
    if (found == barriers.end()) fail("an mbarrier is used before barrier_init");
    if (*pointer != BEGUN) fail("an mbarrier has been written over");
    return found->second;
}

void settle(Barrier& barrier) {
    if (barrier.pending < 0) fail("more arrivals at an mbarrier than it expects");
    if (barrier.pending || barrier.bytes) return;
    barrier.pending = barrier.expected;
    barrier.phase ^= 1;
}

void arrive(std::uint64_t* pointer) {
    Barrier& barrier = at(pointer);
    --barrier.pending;
    settle(barrier);
}

struct Phase : host::Condition {
    const std::uint64_t* pointer;
    const Barrier& barrier;
    unsigned parity;

    Phase(const std::uint64_t* pointer, unsigned parity)
        : pointer(pointer), barrier(at(pointer)), parity(parity) {}
    bool holds() const override { return barrier.phase != parity; }
    std::string text() const override {
        return "the mbarrier at byte " + std::to_string(offset(pointer, 8, "an mbarrier")) +
               " to end phase " + std::to_string(parity) + ", which lacks " +
               std::to_string(barrier.pending) + " of " + std::to_string(barrier.expected) +
               " arrivals and " + std::to_string(barrier.bytes) + " bytes";
    }
};

struct Generation : host::Condition {
    int id;
    unsigned before;

    Generation(int id, unsigned before) : id(id), before(before) {}
    bool holds() const override { return named[id].generation != before; }
    std::string text() const override {
        return "bar.sync " + std::to_string(id) + ", to which " +
               std::to_string(named[id].arrived) + " of " + std::to_string(GROUP) + " have come";
    }
};

// Where a byte of a swizzled row lies: chunks of 16 bytes move by the row's number among eight.
std::size_t swizzled(std::size_t address) { return address ^ (address >> 7 & 7) << 4; }

std::size_t box_rows(const Tiling& tiling) {
    std::size_t rows = 1;
    for (int d = 1; d < tiling.dimensions; ++d) rows *= tiling.box[d];
    return rows;
}

// Where a row of a box begins in the tensor, or null where it lies outside.
const unsigned char* find_row(const Tiling& tiling, std::size_t row, const int* at) {
    std::int64_t bytes = 0;
    for (int d = 1; d < tiling.dimensions; ++d) {
        const std::int64_t i = at[d] + static_cast<std::int64_t>(row % tiling.box[d]);
        row /= tiling.box[d];
        if (i < 0 || i >= static_cast<std::int64_t>(tiling.size[d])) return nullptr;
        bytes += i * static_cast<std::int64_t>(tiling.stride[d - 1]);
    }
    return static_cast<const unsigned char*>(tiling.base) + bytes;
}

void load_box(std::size_t start, const Tiling& tiling, const int* at) {
    auto& view = products_view();
    for (std::size_t row = 0; row < box_rows(tiling); ++row) {
        const unsigned char* const from = find_row(tiling, row, at);
        for (std::size_t x = 0; x < tiling.box[0]; ++x) {
            const std::int64_t i = at[0] + static_cast<std::int64_t>(x);
            std::uint16_t value = 0;  // of what lies outside
            if (from && i >= 0 && i < static_cast<std::int64_t>(tiling.size[0]))
                std::memcpy(&value, from + i * 2, 2);
            const std::size_t where = swizzled(start + (row * tiling.box[0] + x) * 2);
            std::memcpy(memory() + where, &value, 2);
            std::memcpy(view.data() + where, &value, 2);
        }
    }
}

float wide(std::uint16_t bits, Dtype dtype) {
    return dtype == Dtype::bf16 ? widen(bf16{bits}) : widen(fp16{bits});
}

// Rows of 16 elements of an operand, as its descriptor says.
void read_operand(float (*to)[16], std::uint64_t descriptor, int first, int rows, Dtype dtype) {
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0)
        fail("a product's descriptor is not of the swizzle of 128 bytes");
    const auto& view = products_view();
    const std::size_t start = (descriptor & 0x3fff) * 16, group = (descriptor >> 32 & 0x3fff) * 16;
    for (int r = first; r < first + rows; ++r) {
        const std::size_t row = start + r / 8 * group + r % 8 * 128;
        for (int k = 0; k < 16; ++k) {
            const std::size_t where = swizzled(row + k * 2);
            if (where + 2 > view.size()) fail("a product reads outside shared memory");
            std::uint16_t bits;
            std::memcpy(&bits, view.data() + where, 2);
            to[r - first][k] = wide(bits, dtype);
        }
    }
}

// A warp's quarter of one product: 16 rows of `a`, all columns.
void multiply(unsigned first, const Product& like, std::size_t which) {
    static float left[16][16], right[256][16];
    read_operand(left, like.a, static_cast<int>(first % GROUP / LANES * 16), 16, like.dtype);
    read_operand(right, like.b, 0, like.columns, like.dtype);
    for (unsigned lane = 0; lane < LANES; ++lane) {
        const Product& own = threads[first + lane].products[which];
        if (!own.same(like)) fail("lanes of one warp issue different products");
        const unsigned row = lane / 4, column = lane % 4 * 2;
        for (int j = 0; j < own.columns / 8; ++j)
            for (unsigned part = 0; part < 4; ++part) {
                const float* const x = left[row + part / 2 * 8];
                const float* const y = right[8 * j + column + part % 2];
                float sum = 0;
                for (int k = 0; k < 16; ++k) sum += x[k] * y[k];
                float& to = own.sum[4 * j + part];
                to = own.add ? to + sum : sum;
            }
    }
}

// Does the oldest products of the calling warp until `left` groups remain.
void finish(std::size_t left) {
    host::wait_for_warp("a product's warp");
    if (host::lane() == 0) {
        const unsigned first = host::thread_number();
        const Thread& one = threads[first];
        std::size_t count = 0;
        const std::size_t over = one.groups.size() > left ? one.groups.size() - left : 0;
        for (std::size_t g = 0; g < over; ++g) count += one.groups[g];
        for (std::size_t i = 0; i < count; ++i) {
            for (unsigned lane = 0; lane < LANES; ++lane)
                if (threads[first + lane].products.size() != one.products.size())
                    fail("lanes of one warp issue different products");
            multiply(first, one.products[i], i);
        }
        for (unsigned lane = 0; lane < LANES; ++lane) {
            Thread& own = threads[first + lane];
            own.products.erase(own.products.begin(), own.products.begin() + count);
            own.groups.erase(own.groups.begin(), own.groups.begin() + over);
        }
    }
    host::wait_for_warp("a product's warp");
}

}  // namespace

void barrier_init(std::uint64_t* barrier, int count) {
    const std::size_t where = offset(barrier, sizeof *barrier, "an mbarrier");
    if (where % 8) fail("an mbarrier is not at a multiple of 8 bytes");
    if (count < 1 || count > MOST_BYTES) fail("an mbarrier expects at least one arrival");
    *barrier = BEGUN;
    barriers[where] = {count, count};
}

void barriers_ready() {
    for (auto& [where, barrier] : barriers) barrier.ready = true;
}

void barrier_expect(std::uint64_t* barrier, std::uint32_t bytes) {
    Barrier& found = at(barrier);
    found.bytes += bytes;
    if (found.bytes > MOST_BYTES) fail("an mbarrier expects more bytes than it can count");
    arrive(barrier);
    host::may_yield();
}

void barrier_arrive(std::uint64_t* barrier) {
    arrive(barrier);
    host::may_yield();
}

void barrier_arrive_copies(std::uint64_t* barrier) {
    at(barrier);
    host::later([barrier, copies = std::exchange(self().copies, {})] {
        for (const Copy& copy : copies) {
            std::memset(copy.to, 0, 16);
            std::memcpy(copy.to, copy.from, copy.bytes);
            unseen.emplace_back(copy.to - memory(), 16);
        }
        arrive(barrier);
    });
    host::may_yield();
}

void barrier_wait(std::uint64_t* barrier, unsigned phase) {
    host::wait_until(Phase(barrier, phase & 1));
}

void group_sync(int id) {
    if (id < 0 || id >= static_cast<int>(NAMED)) fail("bar.sync of a barrier that is not there");
    Named& barrier = named[id];
    const Generation passed(id, barrier.generation);
    if (++barrier.arrived == GROUP) {
        barrier.arrived = 0;
        ++barrier.generation;
    }
    host::wait_until(passed);
}

void copy16(void* to, const void* from, int bytes) {
    const std::size_t where = offset(to, 16, "a copy");
    if (where % 16 || reinterpret_cast<std::uintptr_t>(from) % 16)
        fail("cp.async of 16 bytes from or to what is not at a multiple of 16 bytes");
    if (bytes < 0 || bytes > 16) fail("cp.async reads 0 to 16 bytes");
    self().copies.push_back({memory() + where, from, static_cast<std::size_t>(bytes)});
}

void generic_writes_to_async_reads() {
    auto& view = products_view();
    for (const auto& [where, bytes] : unseen)
        std::memcpy(view.data() + where, memory() + where, bytes);
    unseen.clear();
    host::may_yield();
}

void store_transposed(void* row, const std::uint32_t (&matrices)[4]) {
    const std::size_t own = offset(row, 16, "stmatrix");
    if (own % 16) fail("a row of stmatrix is not at a multiple of 16 bytes");
    const std::uint64_t* const rows = host::exchange("stmatrix", own);
    const int lane = host::lane();
    for (int i = 0; i < 4; ++i)
        for (int c = 0; c < 2; ++c) {
            const std::size_t where = rows[8 * i + lane % 4 * 2 + c] + lane / 4 * 2;
            const auto value = static_cast<std::uint16_t>(matrices[i] >> (16 * c));
            std::memcpy(memory() + where, &value, 2);
            unseen.emplace_back(where, 2);
        }
}

std::uint64_t matrix(const void* start) {
    const std::size_t where = offset(start, 16, "an operand of a product");
    return std::uint64_t{1} << 62 | std::uint64_t{1024 >> 4} << 32 | std::uint64_t{1} << 16 |
           (where >> 4 & 0x3fff);
}

void products_begin() { self().fenced = true; }

void products_commit() {
    Thread& own = self();
    own.groups.push_back(std::exchange(own.open, 0));
    // In some orders the tensor cores are quick; lane 0 says when.
    if (host::exchange("wgmma.commit_group", host::drawn(2))[0]) finish(0);
}

namespace host {

void begin_hopper(unsigned count) {
    barriers.clear();
    std::fill(std::begin(named), std::end(named), Named{});
    threads.assign(count, Thread{});
    seen.clear();
    unseen.clear();
}

void end_hopper() {
    // A warp group waits for registers that others give back; none come after the last has.
    const std::size_t first = MOST_REGISTERS / threads.size() / 8 * 8;
    std::size_t registers = 0;
    for (const Thread& own : threads) registers += own.registers ? own.registers : first;
    if (registers > first * threads.size()) fail("warp groups take more registers than there are");
    for (std::size_t i = 0; i < threads.size(); ++i) {
        const Thread& own = threads[i];
        if (!own.products.empty()) fail("products are not waited for");
        if (!own.copies.empty()) fail("cp.async are not waited for");
        if (own.issued != threads[i / GROUP * GROUP].issued)
            fail("warps of a group issue different products");
    }
    for (const auto& [where, barrier] : barriers)
        if (barrier.bytes) fail("an mbarrier counts bytes that nobody loads or expects");
}

void tma_load(void* to, const Map& map, std::uint64_t* barrier, const int* first, int dimensions) {
    const Tiling& tiling = map.tiling;
    if (dimensions != tiling.dimensions) fail("a TMA load has other dimensions than its map");
    if (tiling.box[0] != 64) fail("a TMA load's rows are not of 128 bytes");
    const std::size_t bytes = box_rows(tiling) * 128, where = offset(to, bytes, "a TMA load");
    if (where % 128) fail("a TMA load is not to a multiple of 128 bytes");
    if (!at(barrier).ready) fail("TMA uses an mbarrier before barriers_ready");
    later([where, bytes, tiling, barrier, box = std::vector<int>(first, first + dimensions)] {
        load_box(where, tiling, box.data());
        Barrier& found = at(barrier);
        found.bytes -= static_cast<std::int64_t>(bytes);
        settle(found);
    });
    may_yield();
}

void product(float* sum, int columns, Dtype dtype, std::uint64_t a, std::uint64_t b, bool add) {
    Thread& own = self();
    if (!own.fenced) fail("a product without products_begin");
    own.products.push_back({sum, columns, dtype, a, b, add});
    ++own.open;
    ++own.issued;
}

void set_registers(unsigned registers) { self().registers = registers; }

void products_wait(int left) {
    finish(static_cast<std::size_t>(left));
    if (left == 0) self().fenced = false;
    may_yield();
}

}  // namespace host
}  // namespace reap
