// The Python module: launchers with named arguments, pointers and streams as integers.
#include <pybind11/pybind11.h>

#include <string>

#include "kernels.h"

#ifdef REAP_HOST
#include "host/emulation.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace py = pybind11;
using py::literals::operator""_a;
using Address = std::uintptr_t;

namespace {

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

void define_sort(py::module_& m) {
    m.def(
        "sort_slots",
        [](Address ids, int ids_dtype, Address topk_weights, int topk_weights_dtype,
           std::int64_t slots, int experts, Address counts, Address totals, Address offsets,
           Address gather_index, Address scatter_index, int device, Address stream) {
            return reap::sort_slots(
                {at<const void>(ids), ids_dtype, at<const void>(topk_weights), topk_weights_dtype,
                 slots, experts, at<std::int32_t>(counts), at<std::int32_t>(totals),
                 at<std::int64_t>(offsets), at<std::int64_t>(gather_index),
                 at<std::int64_t>(scatter_index)},
                {device, stream});
        },
        py::kw_only(), "ids"_a, "ids_dtype"_a, "topk_weights"_a, "topk_weights_dtype"_a, "slots"_a,
        "experts"_a, "counts"_a, "totals"_a, "offsets"_a, "gather_index"_a, "scatter_index"_a,
        "device"_a, "stream"_a);
    m.def(
        "schedule_tiles",
        [](Address offsets, int experts, int block_m, Address tile_experts, Address tile_rows,
           Address firsts, int device, Address stream) {
            return reap::schedule_tiles(
                {at<const std::int64_t>(offsets), experts, block_m, at<std::int32_t>(tile_experts),
                 at<std::int32_t>(tile_rows), at<std::int32_t>(firsts)},
                {device, stream});
        },
        py::kw_only(), "offsets"_a, "experts"_a, "block_m"_a, "tile_experts"_a, "tile_rows"_a,
        "firsts"_a, "device"_a, "stream"_a);
    m.attr("SORT_CHUNK") = reap::SORT_CHUNK;
    m.attr("SORT_EXPERTS") = reap::SORT_EXPERTS;
}

void define_saliency(py::module_& m) {
    m.def(
        "combine_rows",
        [](Address y, int y_dtype, Address router_weights, int router_weights_dtype,
           Address scatter_index, Address offsets, Address out, int out_dtype, Address norm,
           Address high, Address low, std::int64_t tokens, int top_k, int experts,
           std::int64_t hidden, bool wide, int device, Address stream) {
            return reap::combine_rows(
                {at<const void>(y), y_dtype, at<const void>(router_weights), router_weights_dtype,
                 at<const std::int64_t>(scatter_index), at<const std::int64_t>(offsets),
                 at<void>(out), out_dtype, at<float>(norm), at<float>(high), at<float>(low), tokens,
                 top_k, experts, hidden, wide},
                {device, stream});
        },
        py::kw_only(), "y"_a, "y_dtype"_a, "router_weights"_a, "router_weights_dtype"_a,
        "scatter_index"_a, "offsets"_a, "out"_a, "out_dtype"_a, "norm"_a, "high"_a, "low"_a,
        "tokens"_a, "top_k"_a, "experts"_a, "hidden"_a, "wide"_a, "device"_a, "stream"_a);
    m.def(
        "reduce_slots",
        [](Address norm, Address high, Address low, Address router_weights,
           int router_weights_dtype, Address gather_index, Address offsets, Address tile_experts,
           Address tile_rows, Address firsts, Address mask, Address group, Address partials,
           Address counts, Address sums, Address extrema, std::int64_t max_tiles, int block_m,
           int experts, int top_k, int groups, int first_group, int device, Address stream) {
            return reap::reduce_slots({at<const float>(norm),
                                       at<const float>(high),
                                       at<const float>(low),
                                       at<const void>(router_weights),
                                       router_weights_dtype,
                                       at<const std::int64_t>(gather_index),
                                       at<const std::int64_t>(offsets),
                                       at<const std::int32_t>(tile_experts),
                                       at<const std::int32_t>(tile_rows),
                                       at<const std::int32_t>(firsts),
                                       at<const bool>(mask),
                                       at<const std::int64_t>(group),
                                       at<double>(partials),
                                       at<std::int64_t>(counts),
                                       at<double>(sums),
                                       at<float>(extrema),
                                       max_tiles,
                                       block_m,
                                       experts,
                                       top_k,
                                       groups,
                                       first_group},
                                      {device, stream});
        },
        py::kw_only(), "norm"_a, "high"_a, "low"_a, "router_weights"_a, "router_weights_dtype"_a,
        "gather_index"_a, "offsets"_a, "tile_experts"_a, "tile_rows"_a, "firsts"_a, "mask"_a,
        "group"_a, "partials"_a, "counts"_a, "sums"_a, "extrema"_a, "max_tiles"_a, "block_m"_a,
        "experts"_a, "top_k"_a, "groups"_a, "first_group"_a, "device"_a, "stream"_a);
    m.attr("COMBINE_SLOTS") = reap::COMBINE_SLOTS;
}

void define_dequant(py::module_& m) {
    const auto define = [&](const char* name, int (*run)(const reap::Dequant&, reap::Where)) {
        m.def(
            name,
            [run](Address values, Address scales, int scales_dtype, Address offsets, Address out,
                  int experts, std::int64_t rows, std::int64_t columns, int block_rows,
                  int block_columns, int device, Address stream) {
                return run({at<const void>(values), at<const void>(scales), scales_dtype,
                            at<const std::int64_t>(offsets), at<void>(out), experts, rows, columns,
                            block_rows, block_columns},
                           {device, stream});
            },
            py::kw_only(), "values"_a, "scales"_a, "scales_dtype"_a, "offsets"_a, "out"_a,
            "experts"_a, "rows"_a, "columns"_a, "block_rows"_a, "block_columns"_a, "device"_a,
            "stream"_a);
    };
    define("dequantize_fp8", &reap::dequantize_fp8);
    define("dequantize_mxfp4", &reap::dequantize_mxfp4);
    define("dequantize_int4", &reap::dequantize_int4);
}

void define_products(py::module_& m) {
    m.def(
        "multiply_experts",
        [](Address tokens, int tokens_dtype, std::int64_t token_rows, std::int64_t token_stride,
           Address gather_index, int top_k, Address up, Address gate, std::int64_t expert_stride,
           std::int64_t row_stride, Address table, Address bias, std::int64_t bias_expert_stride,
           std::int64_t bias_row_stride, Address gate_bias, std::int64_t gate_bias_expert_stride,
           std::int64_t gate_bias_row_stride, int formula, float limit, float alpha,
           Address offsets, Address tile_experts, Address tile_rows, Address firsts, Address out,
           std::int64_t slots, int experts, int width, int depth, int group, int device,
           Address stream) {
            reap::Product call{};
            call.dtype = tokens_dtype;
            call.formula = formula;
            call.limit = limit;
            call.alpha = alpha;
            call.tokens = at<const void>(tokens);
            call.token_rows = token_rows;
            call.token_stride = token_stride;
            call.gather_index = at<const std::int64_t>(gather_index);
            call.top_k = top_k;
            call.matrices = {at<const void>(up), at<const void>(gate), expert_stride, row_stride,
                             at<const void>(table)};
            call.bias = {at<const void>(bias), bias_expert_stride, bias_row_stride};
            call.gate_bias = {at<const void>(gate_bias), gate_bias_expert_stride,
                              gate_bias_row_stride};
            call.offsets = at<const std::int64_t>(offsets);
            call.tile_experts = at<const std::int32_t>(tile_experts);
            call.tile_rows = at<const std::int32_t>(tile_rows);
            call.firsts = at<const std::int32_t>(firsts);
            call.out = at<void>(out);
            call.slots = slots;
            call.experts = experts;
            call.width = width;
            call.depth = depth;
            call.group = group;
            return reap::multiply_experts(call, {device, stream});
        },
        py::kw_only(), "tokens"_a, "tokens_dtype"_a, "token_rows"_a, "token_stride"_a,
        "gather_index"_a, "top_k"_a, "up"_a, "gate"_a, "expert_stride"_a, "row_stride"_a, "table"_a,
        "bias"_a, "bias_expert_stride"_a, "bias_row_stride"_a, "gate_bias"_a,
        "gate_bias_expert_stride"_a, "gate_bias_row_stride"_a, "formula"_a, "limit"_a, "alpha"_a,
        "offsets"_a, "tile_experts"_a, "tile_rows"_a, "firsts"_a, "out"_a, "slots"_a, "experts"_a,
        "width"_a, "depth"_a, "group"_a, "device"_a, "stream"_a);
    m.def(
        "describe_experts",
        [](int dtype, Address ups, Address gates, std::int64_t row_stride, int experts, int width,
           int depth, Address table, int device) {
            return reap::describe_experts({dtype, at<const std::uint64_t>(ups),
                                           at<const std::uint64_t>(gates), row_stride, experts,
                                           width, depth, at<void>(table), device});
        },
        py::kw_only(), "dtype"_a, "ups"_a, "gates"_a, "row_stride"_a, "experts"_a, "width"_a,
        "depth"_a, "table"_a, "device"_a,
        "Fills `table`, host memory of `table_bytes(experts)`, from host arrays of addresses.");
    m.def("table_bytes", &reap::table_bytes, "experts"_a);
    py::dict formulas;
    const auto name = [&](const char* kind, reap::Formula formula) {
        formulas[kind] = static_cast<int>(formula);
    };
    name("none", reap::Formula::none);
    name("relu2", reap::Formula::relu2);
    name("silu", reap::Formula::silu);
    name("gelu_tanh", reap::Formula::gelu_tanh);
    name("silu_clamped_in", reap::Formula::silu_clamped_in);
    name("silu_clamped_out", reap::Formula::silu_clamped_out);
    name("swiglu_oai", reap::Formula::swiglu_oai);
    m.attr("FORMULAS") = formulas;
    m.attr("PRODUCT_ROWS") = reap::PRODUCT_ROWS;
}

// Named arguments of a call that has too many for a signature.
class Given {
  public:
    explicit Given(const py::kwargs& all) : all_(all) {}

    template <class T>
    T number(const std::string& name) const {
        return py::cast<T>(all_[name.c_str()]);
    }

    template <class T>
    T* pointer(const std::string& name) const {
        return at<T>(number<Address>(name));
    }

    // Of the product whose arguments' names begin with `name`.
    reap::Weights weights(const std::string& name) const {
        const auto bias = [&](const std::string& own) -> reap::Biases {
            return {pointer<const void>(own), number<std::int64_t>(own + "_expert_stride"),
                    number<std::int64_t>(own + "_row_stride")};
        };
        return {{pointer<const void>(name + "_up"), pointer<const void>(name + "_gate"),
                 number<std::int64_t>(name + "_expert_stride"),
                 number<std::int64_t>(name + "_row_stride"), pointer<const void>(name + "_table")},
                bias(name + "_bias"),
                bias(name + "_gate_bias")};
    }

  private:
    const py::kwargs& all_;
};

// The sizes of a layer, which its workspace depends on.
reap::Layer layer_sizes(const Given& given) {
    reap::Layer call{};
    call.tokens = given.number<std::int64_t>("tokens");
    call.top_k = given.number<int>("top_k");
    call.experts = given.number<int>("experts");
    call.width = given.number<int>("width");
    call.inner = given.number<int>("inner");
    call.groups = given.number<int>("groups");
    return call;
}

int run_layer(const py::kwargs& all) {
    const Given given(all);
    reap::Layer call = layer_sizes(given);
    call.hidden = given.pointer<const void>("hidden");
    call.dtype = given.number<int>("hidden_dtype");
    call.ids = given.pointer<const void>("ids");
    call.ids_dtype = given.number<int>("ids_dtype");
    call.router_weights = given.pointer<const void>("router_weights");
    call.router_weights_dtype = given.number<int>("router_weights_dtype");
    call.formula = given.number<int>("formula");
    call.limit = given.number<float>("limit");
    call.alpha = given.number<float>("alpha");
    call.tiles = given.number<int>("tiles");
    call.first = given.weights("first");
    call.second = given.weights("second");
    call.out = given.pointer<void>("out");
    call.counts = given.pointer<std::int64_t>("counts");
    call.sums = given.pointer<double>("sums");
    call.extrema = given.pointer<float>("extrema");
    call.mask = given.pointer<const bool>("mask");
    call.group = given.pointer<const std::int64_t>("group");
    call.first_group = given.number<int>("first_group");
    call.workspace = given.pointer<void>("workspace");
    return reap::run_layer(call, {given.number<int>("device"), given.number<Address>("stream")});
}

void define_layer(py::module_& m) {
    m.def("run_layer", &run_layer, "One MoE layer; named arguments as fields of `Layer`.");
    m.def(
        "layer_bytes",
        [](const py::kwargs& sizes) { return reap::layer_bytes(layer_sizes(Given(sizes))); },
        "Workspace of `run_layer`: tokens, top_k, experts, width, inner, groups.");
}

void define_dtypes(py::module_& m) {
    py::dict dtypes;
    const auto name = [&](const char* torch, reap::Dtype dtype) {
        dtypes[torch] = static_cast<int>(dtype);
    };
    name("bfloat16", reap::Dtype::bf16);
    name("float16", reap::Dtype::fp16);
    name("float32", reap::Dtype::fp32);
    name("float64", reap::Dtype::fp64);
    name("int32", reap::Dtype::int32);
    name("int64", reap::Dtype::int64);
    m.attr("DTYPES") = dtypes;
}

#ifdef REAP_HOST

void define_platform(py::module_& m) {
    m.attr("CUDA_VERSION") = "host";
    m.def("error",
          [](int status) { return "status " + std::to_string(status) + " of the host emulation"; });
    m.def("set_order", &reap::host::set_order, "seed"_a,
          "Another order of threads and blocks; 0 is the natural one.");
}

#else

void define_platform(py::module_& m) {
    m.attr("CUDA_VERSION") =
        std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
    m.def(
        "error",
        [](int status) {
            const auto code = static_cast<cudaError_t>(status);
            return std::string(cudaGetErrorName(code)) + " (" + std::to_string(status) +
                   "): " + cudaGetErrorString(code);
        },
        "status"_a);
}

#endif

}  // namespace

#ifdef REAP_HOST
PYBIND11_MODULE(_host, m) {
#else
PYBIND11_MODULE(_C, m) {
#endif
    m.doc() = "Kernels of reap-kernels: pointers, sizes and a stream in, a CUDA status out.";
    define_dtypes(m);
    define_platform(m);
    define_sort(m);
    define_saliency(m);
    define_dequant(m);
    define_products(m);
    define_layer(m);
}
