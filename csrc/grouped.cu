// Launches of the products of grouped.cuh, and the tensor maps they read by.
#include <cmath>
#include <cstring>
#include <limits>

#include "grouped.cuh"

namespace reap {
namespace {

using grouped::Call;
using grouped::Form;

constexpr std::int64_t MOST_INDEX = (std::int64_t{1} << 31) - 1;
constexpr std::uint64_t ELEMENT = 2;  // bytes

// One expert's matrices, or all of them where they are `count` with a stride.
struct Stack {
    const void* up;
    const void* gate;  // or null
    std::int64_t count, expert_stride, row_stride;
    int width, depth, dtype;
};

bool is_half(int dtype) { return dtype == int(Dtype::bf16) || dtype == int(Dtype::fp16); }

// A box is what a stage holds: 128 rows of 64 elements; gated, eight times 8 gate rows and 8 up
// rows. The lower of gates and ups comes first, since no stride is negative: `swapped` says when it
// is ups.
int encode_weights(const Stack& stack, Map* map, std::int32_t* swapped) {
    const auto up = reinterpret_cast<std::uintptr_t>(stack.up);
    const auto gate = stack.gate ? reinterpret_cast<std::uintptr_t>(stack.gate) : up;
    const auto width = static_cast<std::uint64_t>(stack.width);
    const auto row = static_cast<std::uint64_t>(stack.row_stride) * ELEMENT;
    // A dimension of one element has a stride nobody uses, but one the driver must like.
    const auto expert =
        stack.count == 1 ? 16 : static_cast<std::uint64_t>(stack.expert_stride) * ELEMENT;
    Tiling tiling{};
    tiling.dtype = stack.dtype;
    tiling.dimensions = 5;
    tiling.size[0] = static_cast<std::uint64_t>(stack.depth);
    tiling.size[4] = static_cast<std::uint64_t>(stack.count);
    tiling.box[0] = grouped::DEPTH;
    tiling.box[4] = 1;
    tiling.stride[0] = row;
    tiling.stride[3] = expert;
    *swapped = up < gate;
    if (stack.gate) {
        tiling.base = up < gate ? stack.up : stack.gate;
        tiling.size[1] = 8, tiling.size[2] = 2, tiling.size[3] = width / 8;
        tiling.box[1] = 8, tiling.box[2] = 2, tiling.box[3] = grouped::WEIGHT_ROWS / 16;
        tiling.stride[1] = up < gate ? gate - up : up - gate;
        tiling.stride[2] = row * 8;
    } else {
        tiling.base = stack.up;
        tiling.size[1] = width, tiling.size[2] = tiling.size[3] = 1;
        tiling.box[1] = grouped::WEIGHT_ROWS, tiling.box[2] = tiling.box[3] = 1;
        tiling.stride[1] = tiling.stride[2] = 16;
    }
    return encode_map(tiling, map);
}

// Boxes of grouped::STEP sorted rows.
int encode_tokens(const Product& call, Map* map) {
    Tiling tiling{};
    tiling.base = call.tokens;
    tiling.dtype = call.dtype;
    tiling.dimensions = 2;
    tiling.size[0] = static_cast<std::uint64_t>(call.depth);
    tiling.size[1] = static_cast<std::uint64_t>(call.token_rows);
    tiling.stride[0] = static_cast<std::uint64_t>(call.token_stride) * ELEMENT;
    tiling.box[0] = grouped::DEPTH;
    tiling.box[1] = grouped::STEP;
    return encode_map(tiling, map);
}

Form form_of(const Product& call) {
    constexpr float NONE = std::numeric_limits<float>::infinity();
    // (1 + tanh z) / 2 = sigmoid(2 z), z = sqrt(2 / pi) (g + 0.044715 g^3)
    constexpr float TWICE = 2 * 0.7978845608028654f;
    switch (static_cast<Formula>(call.formula)) {
        case Formula::gelu_tanh:
            return {NONE, NONE, NONE, TWICE, TWICE * 0.044715f, 0};
        case Formula::silu_clamped_in:
            return {call.limit, call.limit, NONE, 1, 0, 0};
        case Formula::silu_clamped_out:
            return {NONE, call.limit, call.limit, 1, 0, 0};
        case Formula::swiglu_oai:
            return {call.limit, call.limit, NONE, call.alpha, 0, 1};
        default:
            return {NONE, NONE, NONE, 1, 0, 0};
    }
}

// Whether kernels take the sizes and addresses; what concerns maps alone, encode_map asks.
bool is_served(const Product& call, bool gated) {
    const auto aligned = [](const void* at) {
        return reinterpret_cast<std::uintptr_t>(at) % 16 == 0;
    };
    if (!is_half(call.dtype) || call.formula < 0 || call.formula > int(Formula::swiglu_oai))
        return false;
    if (!call.matrices.table && (call.matrices.gate != nullptr) != gated) return false;
    if (call.experts < 1 || call.width < 8 || call.width % 8 || call.depth < 8 || call.depth % 8 ||
        call.group < 1 || call.slots > MOST_INDEX - PRODUCT_ROWS || call.token_rows < 1)
        return false;
    if (!aligned(call.tokens) || !aligned(call.out) || call.token_stride % 8 ||
        call.token_stride < 0)
        return false;
    // Producers count 16-byte chunks in 32 bits.
    if (call.gather_index)
        return call.top_k > 0 && call.token_rows * (call.token_stride / 8) <= MOST_INDEX * 2;
    return true;
}

Call device_call(const Product& call, int weight_tiles) {
    const auto bias = [](const Biases& from) {
        return grouped::Bias{from.base, from.expert_stride, from.row_stride};
    };
    const auto* const maps = static_cast<const Map*>(call.matrices.table);
    Call to{};
    to.tokens = static_cast<const unsigned char*>(call.tokens);
    to.gather_index = call.gather_index;
    to.offsets = call.offsets;
    to.tile_experts = call.tile_experts;
    to.tile_rows = call.tile_rows;
    to.tiles = call.firsts + call.experts;
    to.maps = maps;
    to.swaps = maps ? reinterpret_cast<const std::int32_t*>(maps + call.experts) : nullptr;
    to.square = call.formula == int(Formula::relu2);
    to.form = form_of(call);
    to.bias = bias(call.bias);
    to.gate_bias = bias(call.gate_bias);
    to.out = call.out;
    to.token_chunks = static_cast<std::uint32_t>(call.token_stride / 8);
    to.top_k = call.top_k;
    to.depth = call.depth;
    to.width = call.width;
    to.weight_tiles = weight_tiles;
    to.group = call.group;
    return to;
}

template <bool GATED>
auto kernel_of(int dtype) {
    return dtype == int(Dtype::bf16) ? grouped::multiply_tiles<bf16, GATED>
                                     : grouped::multiply_tiles<fp16, GATED>;
}

}  // namespace

int multiply_experts(const Product& call, Where where) {
    const bool gated = call.formula >= int(Formula::silu);
    if (call.slots == 0) return SUCCESS;
    if (!is_served(call, gated)) return INVALID_VALUE;
    const int processors = hopper_processors(where.device);
    if (processors == 0) return NO_CODE;
    const int rows = grouped::WEIGHT_ROWS / (gated ? 2 : 1);
    const std::int64_t weight_tiles = ceil_div(call.width, rows);
    const std::int64_t tiles = ceil_div(call.slots, PRODUCT_ROWS) + call.experts;
    // Blocks count past the last tile once.
    if (tiles * weight_tiles > MOST_INDEX - processors) return INVALID_VALUE;
    Call to = device_call(call, static_cast<int>(weight_tiles));
    Map weights{}, tokens{};
    if (!to.maps) {
        std::int32_t swapped = 0;
        const Matrices& own = call.matrices;
        const int status = encode_weights({own.up, own.gate, call.experts, own.expert_stride,
                                           own.row_stride, call.width, call.depth, call.dtype},
                                          &weights, &swapped);
        if (status != SUCCESS) return status;
        to.swapped = swapped;
    }
    if (!call.gather_index)
        if (const int status = encode_tokens(call, &tokens); status != SUCCESS) return status;
    const std::int64_t blocks = tiles * weight_tiles;
    const Grid grid{static_cast<unsigned>(blocks < processors ? blocks : processors)};
    const Threads threads{grouped::GROUP * (1 + grouped::CONSUMERS)};
    const auto kernel = gated ? kernel_of<true>(call.dtype) : kernel_of<false>(call.dtype);
    return launch(kernel, grid, threads, grouped::SHARED, where, to, weights, tokens);
}

int describe_experts(const Table& call) {
    if (!is_half(call.dtype) || call.experts < 1 || call.width < 8 || call.width % 8 ||
        call.depth < 8 || call.depth % 8)
        return INVALID_VALUE;
    // A thread that has launched nothing has no current device; the driver encodes only with one.
    if (hopper_processors(call.device) == 0) return NO_CODE;
    auto* const to = static_cast<unsigned char*>(call.table);
    for (int expert = 0; expert < call.experts; ++expert) {
        Map map{};
        std::int32_t swapped = 0;
        const auto at = [expert](const std::uint64_t* addresses) {
            return addresses ? reinterpret_cast<const void*>(addresses[expert]) : nullptr;
        };
        const int status = encode_weights({at(call.ups), at(call.gates), 1, 0, call.row_stride,
                                           call.width, call.depth, call.dtype},
                                          &map, &swapped);
        if (status != SUCCESS) return status;
        std::memcpy(to + expert * sizeof map, &map, sizeof map);
        std::memcpy(to + call.experts * sizeof map + expert * sizeof swapped, &swapped,
                    sizeof swapped);
    }
    return SUCCESS;
}

}  // namespace reap
