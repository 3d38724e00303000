// Kernels that use the words of Hopper, rightly or wrongly on purpose; the arguments pick one and
// its order. Right ones print nothing and return 0; 3 says that what they computed is wrong.
#include "hopper.cuh"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "launch.cuh"

using namespace reap;

constexpr int ROWS = 64, COLUMNS = 32, DEPTH = 64, TILE = DEPTH * 2;
constexpr int A = 0, B = ROWS * TILE, BARRIERS = B + COLUMNS * TILE, BYTES = BARRIERS + 64;

// out[64, 32] = a[64, 64] b[32, 64]^T by one warp group; b has only 27 rows, the others are zeros.
struct Case {
    Map a, b;
    const bf16* gathered;  // b, for copies by threads
    float* out;
    std::string wrong;  // what is wrong; empty for nothing

    bool is(const char* name) const { return wrong == name; }
};

float value(int row, int column) { return static_cast<float>((row * 7 + column * 3) % 11 - 5); }

void copy_rows(const Case& test, unsigned char* to) {
    for (int i = static_cast<int>(threadIdx.x); i < COLUMNS * 8; i += 128) {
        const int row = i / 8, chunk = i % 8,
                  moved = test.is("no swizzle") ? chunk : chunk ^ row % 8;
        const bool inside = row < 27;
        copy16(to + row * TILE + moved * 16, test.gathered + (inside ? row * DEPTH + chunk * 8 : 0),
               inside ? 16 : 0);
    }
}

void load(const Case& test, unsigned char* memory, std::uint64_t* full, bool copies) {
    if (threadIdx.x == 0) {
        int bytes = copies ? ROWS * TILE : (ROWS + COLUMNS) * TILE;
        if (test.is("more bytes")) bytes += 128;
        barrier_expect(full, static_cast<std::uint32_t>(bytes));
        if (test.is("another arrival")) barrier_arrive(full);
        tma_load_2d(memory + A + (test.is("odd address") ? 64 : 0), &test.a, full, 0, 0);
        if (!copies) tma_load_2d(memory + B, &test.b, full, 0, 0);
    }
    if (!copies) return;
    copy_rows(test, memory + B);
    if (test.is("arrival before copies"))
        barrier_arrive(full);
    else
        barrier_arrive_copies(full);
}

void multiply(const Case& test, unsigned char* memory, float (&sum)[ACCUMULATOR]) {
    const std::uint64_t a = matrix(memory + A), b = matrix(memory + B);
    if (!test.is("no fence of products")) products_begin();
    for (int i = 0; i < DEPTH / 16; ++i) {
        const int step = test.is("lanes differ") && threadIdx.x == 5 ? 0 : i;
        if (test.is("a warp issues less") && threadIdx.x < WARP && i == 3) continue;
        product<bf16, COLUMNS>(sum, a + 2 * step, b + 2 * step, i != 0);
    }
    if (!test.is("no commit")) products_commit();
    if (!test.is("no wait for products")) products_wait<0>();
}

void kernel(const Case* given) {
    const Case& test = *given;
    REAP_SHARED(unsigned char, memory);
    auto* const full = reinterpret_cast<std::uint64_t*>(memory + BARRIERS);
    const bool copies = !test.is("TMA alone");
    if (threadIdx.x == 0) {
        if (!test.is("no initialization")) barrier_init(full, copies ? 129 : 1);
        if (!test.is("no fence of barriers")) barriers_ready();
    }
    __syncthreads();
    load(test, memory, full, copies);
    if (test.is("barrier overwritten") && threadIdx.x == 0) *full = 0;
    if (!test.is("no wait for loads")) barrier_wait(full, 0);
    if (copies && !test.is("no fence of copies")) generic_writes_to_async_reads();
    float sum[ACCUMULATOR] = {};
    multiply(test, memory, sum);
    const int thread = static_cast<int>(threadIdx.x), row = thread / 32 * 16 + thread % 32 / 4;
    for (int j = 0; j < COLUMNS / 8; ++j)
        for (int part = 0; part < 4; ++part)
            test.out[(row + part / 2 * 8) * COLUMNS + 8 * j + thread % 4 * 2 + part % 2] =
                sum[4 * j + part];
    if (test.is("a thread stays away") && threadIdx.x == 70) return;
    group_sync(1);
}

// Loads three stages into one place. All threads wait for each to be free, but only the one that
// loads has to: another may miss a phase.
void idle_waiters(const Case* given) {
    REAP_SHARED(unsigned char, memory);
    auto* const full = reinterpret_cast<std::uint64_t*>(memory + BARRIERS);
    auto* const empty = full + 1;
    if (threadIdx.x == 0) {
        barrier_init(full, 1);
        barrier_init(empty, 1);
        barriers_ready();
    }
    __syncthreads();
    for (unsigned k = 0; k < 3; ++k)
        if (threadIdx.x < 64) {
            barrier_wait(empty, k % 2 ^ 1);
            if (threadIdx.x != 0) continue;
            barrier_expect(full, ROWS * TILE);
            tma_load_2d(memory + A, &given->a, full, 0, 0);
        } else if (threadIdx.x == 64) {
            barrier_wait(full, k % 2);
            barrier_arrive(empty);
        }
}

bool right(const float* out) {
    for (int row = 0; row < ROWS; ++row)
        for (int column = 0; column < COLUMNS; ++column) {
            float want = 0;
            for (int k = 0; column < 27 && k < DEPTH; ++k) want += value(row, k) * value(column, k);
            if (out[row * COLUMNS + column] != want) return false;
        }
    return true;
}

Map map_of(const bf16* base, int rows, int box) {
    Map map{};
    map.tiling = {base,   {DEPTH, static_cast<std::uint64_t>(rows)},
                  {TILE}, {DEPTH, static_cast<std::uint32_t>(box)},
                  2,      static_cast<int>(Dtype::bf16)};
    return map;
}

int main(int argc, char** argv) {
    if (argc != 3) return 2;
    host::set_order(static_cast<unsigned>(std::atoi(argv[2])));
    alignas(16) static bf16 a[ROWS * DEPTH], b[27 * DEPTH];
    static float out[ROWS * COLUMNS];
    for (int i = 0; i < ROWS * DEPTH; ++i) narrow(value(i / DEPTH, i % DEPTH), a[i]);
    for (int i = 0; i < 27 * DEPTH; ++i) narrow(value(i / DEPTH, i % DEPTH), b[i]);
    const Case test{map_of(a, ROWS, ROWS), map_of(b, 27, COLUMNS), b, out, argv[1]};
    const bool idle = test.is("idle waiters");
    const int bytes = test.is("too little memory") ? B : BYTES;
    const int status = launch(idle ? idle_waiters : kernel, Grid{1}, Threads{128},
                              static_cast<unsigned>(bytes), Where{}, &test);
    return status ? status : idle || right(out) ? 0 : 3;
}
