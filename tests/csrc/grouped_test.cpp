// Both products of a layer of experts against float64, in one order of threads: `bf16` or `fp16`,
// and the order's number. Returns 0, a launcher's status, or 3 after saying what is wrong.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "host/emulation.h"
#include "kernels.h"
#include "types.cuh"

using namespace reap;

namespace {

// Tiles of 137, 256, 45, 64 and 1 rows, and an expert without rows.
const std::vector<int> ROWS = {137, 0, 301, 64, 1};
constexpr int TOP_K = 8, TOKENS = 150, HIDDEN = 192, WIDTH = 96;
constexpr int UNSERVED = PRODUCT_ROWS;  // rows that are there, but of no expert
constexpr int GROUP = 2;
const int EXPERTS = static_cast<int>(ROWS.size());

// Lists of sorted rows; see kernels.h.
struct Rows {
    std::vector<std::int64_t> offsets = {0}, gather_index;
    std::vector<std::int32_t> tile_experts, tile_rows, firsts;

    Rows() {
        for (int expert = 0; expert < EXPERTS; ++expert) {
            firsts.push_back(static_cast<std::int32_t>(tile_rows.size()));
            for (int row = 0; row < ROWS[expert]; row += PRODUCT_ROWS) {
                tile_experts.push_back(expert);
                tile_rows.push_back(static_cast<std::int32_t>(offsets.back() + row));
            }
            offsets.push_back(offsets.back() + ROWS[expert]);
        }
        firsts.push_back(static_cast<std::int32_t>(tile_rows.size()));
        std::mt19937 random(7);
        for (int row = 0; row < count(); ++row)
            gather_index.push_back(static_cast<std::int64_t>(random() % (TOKENS * TOP_K)));
        // Nobody may gather these.
        gather_index.insert(gather_index.end(), PRODUCT_ROWS, std::numeric_limits<int>::max());
    }
    int count() const { return static_cast<int>(offsets.back()); }
};

// Memory at a multiple of 128 bytes, all ones: NaN, where nothing is written.
template <class T>
struct Array {
    T* at;
    std::size_t size;

    explicit Array(std::size_t size)
        : at(static_cast<T*>(std::aligned_alloc(128, (size * sizeof(T) + 127) / 128 * 128))),
          size(size) {
        std::memset(static_cast<void*>(at), 0xff, size * sizeof(T));
    }
    Array(const Array&) = delete;
    ~Array() { std::free(at); }

    void draw(float deviation) {
        static std::mt19937 random(1);
        std::normal_distribution<float> normal(0, deviation);
        for (std::size_t i = 0; i < size; ++i) narrow(normal(random), at[i]);
    }
};

template <class T>
double dot(const T* a, const T* b, int size) {
    double sum = 0;
    for (int i = 0; i < size; ++i) sum += double{widen(a[i])} * double{widen(b[i])};
    return sum;
}

// Whether `out` is what `want(expert, row, column)` says, and is untouched after the last row.
template <class T, class Want>
bool right(const char* name, const Rows& rows, const Array<T>& out, int width, Want want) {
    double off = 0, norm = 0;
    for (int expert = 0; expert < EXPERTS; ++expert)
        for (std::int64_t row = rows.offsets[expert]; row < rows.offsets[expert + 1]; ++row)
            for (int column = 0; column < width; ++column) {
                const double wanted = want(expert, row, column);
                const double difference = widen(out.at[row * width + column]) - wanted;
                off += difference * difference;
                norm += wanted * wanted;
            }
    std::size_t touched = 0;
    for (std::size_t i = static_cast<std::size_t>(rows.count()) * width; i < out.size; ++i)
        touched += out.at[i].bits != 0xffff;
    // A result is rounded once, so that half a unit in the last of 8 or 11 bits is the most.
    const double error = std::sqrt(off / norm), most = std::is_same_v<T, bf16> ? 0x1p-8 : 0x1p-11;
    if (error < most && !touched) return true;
    std::printf("%s is off by %.2e of its norm; %zu elements past the end are written\n", name,
                error, touched);
    return false;
}

template <class T>
int test(Dtype dtype) {
    const Rows rows;
    const std::size_t slots = static_cast<std::size_t>(rows.count()) + UNSERVED;
    Array<T> x(std::size_t{TOKENS} * HIDDEN), up(std::size_t(EXPERTS) * 2 * WIDTH * HIDDEN),
        down(std::size_t(EXPERTS) * HIDDEN * WIDTH), h(slots * WIDTH), y(slots * HIDDEN);
    x.draw(1);
    up.draw(1 / std::sqrt(float{HIDDEN}));
    down.draw(1 / std::sqrt(float{WIDTH}));
    Product call{};
    call.dtype = static_cast<int>(dtype);
    call.limit = std::numeric_limits<float>::infinity();
    call.top_k = TOP_K;
    call.offsets = rows.offsets.data();
    call.tile_experts = rows.tile_experts.data();
    call.tile_rows = rows.tile_rows.data();
    call.firsts = rows.firsts.data();
    call.slots = static_cast<std::int64_t>(slots);
    call.experts = EXPERTS;
    call.group = GROUP;

    Product first = call;
    first.formula = static_cast<int>(Formula::silu);
    first.tokens = x.at;
    first.token_rows = TOKENS;
    first.token_stride = first.depth = HIDDEN;
    first.gather_index = rows.gather_index.data();
    first.matrices = {up.at + WIDTH * HIDDEN, up.at, 2 * WIDTH * HIDDEN, HIDDEN, nullptr};
    first.out = h.at;
    first.width = WIDTH;
    if (const int status = multiply_experts(first, Where{})) return status;

    Product second = call;
    second.tokens = h.at;
    second.token_rows = call.slots;
    second.token_stride = second.depth = WIDTH;
    second.matrices = {down.at, nullptr, HIDDEN * WIDTH, WIDTH, nullptr};
    second.out = y.at;
    second.width = HIDDEN;
    if (const int status = multiply_experts(second, Where{})) return status;

    const bool h_right = right("h", rows, h, WIDTH, [&](int expert, std::int64_t row, int column) {
        const T* const token = x.at + rows.gather_index[row] / TOP_K * HIDDEN;
        const T* const gates = up.at + std::size_t(expert) * 2 * WIDTH * HIDDEN + column * HIDDEN;
        const double gate = dot(token, gates, HIDDEN);
        return gate / (1 + std::exp(-gate)) * dot(token, gates + WIDTH * HIDDEN, HIDDEN);
    });
    const bool y_right = right("y", rows, y, HIDDEN, [&](int expert, std::int64_t row, int column) {
        return dot(h.at + row * WIDTH, down.at + (std::size_t(expert) * HIDDEN + column) * WIDTH,
                   WIDTH);
    });
    return h_right && y_right ? 0 : 3;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3) return 2;
    host::set_order(static_cast<unsigned>(std::atoi(argv[2])));
    return std::strcmp(argv[1], "bf16") == 0 ? test<bf16>(Dtype::bf16) : test<fp16>(Dtype::fp16);
}
