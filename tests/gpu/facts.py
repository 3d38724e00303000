"""What only a GPU can establish: no host sync, graphs, streams, memory, 64-bit rows."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import reap_kernels as rk
from bench.gpu.verify import CheckFailed, NotHere, bounds_of, products_of
from reap_kernels import LayerStats
from reap_kernels.stats import COUNTS, SUMS
from reap_kernels.testing import (
    Case,
    Inputs,
    largest_relative_error,
    make_experts,
    make_inputs,
    relative_error,
)
from reap_kernels.types import ExpertWeights
from tests.gpu.checks import BACKENDS, Check, observe, same_bits

FACT = Case(
    "fact",
    "all of it at once",
    512,
    16,
    4,
    512,
    256,
    skew="zipf",
    foreign=0.1,
    masked=0.2,
    groups=3,
)
_SMOKE_FACT = replace(FACT, tokens=16, experts=4, top_k=2, hidden=64, intermediate=32)
# y has S * H = 131,200 * 8 * 2048 elements, 2^31 and two million more.
WIDE = Case("wide", "offsets beyond 32 bits", 131_200, 8, 8, 2048, 64)
_SMOKE_WIDE = replace(WIDE, tokens=16, experts=4, top_k=2, hidden=64, intermediate=32)
MEMORY = Case("memory", "scratch beside input and output", 8192, 16, 4, 1024, 512)
_SLACK = 8 << 20  # allocations are rounded up, and products may have workspaces


def _made(
    device: torch.device, dtype: torch.dtype, case: Case, backend: str, layout: str = "stacked"
) -> tuple[Inputs, ExpertWeights, Tensor, LayerStats]:
    """Inputs of a case and what a warmed-up call gives for them."""
    inputs = make_inputs(case, dtype, device=device)
    experts = make_experts(case, layout, dtype=dtype, device=device)
    if device.type == "cuda":
        observe(inputs, experts, backend, case.groups)
    out, stats = observe(inputs, experts, backend, case.groups)
    assert stats is not None
    return inputs, experts, out, stats


def _expect(problems: list[str], found: str) -> str:
    if problems:
        raise CheckFailed("; ".join(problems))
    return found


def _same(out: Tensor, stats: LayerStats | None, want: Tensor, truth: LayerStats) -> list[str]:
    problems = [] if torch.equal(out, want) else ["the output has other bits"]
    return problems + same_bits(stats, truth)


def _need_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise NotHere("needs a CUDA device")


def no_host_sync(
    device: torch.device, backend: str, dtype: torch.dtype, case: Case, layout: str = "stacked"
) -> str:
    """A warmed-up call with mask, groups and statistics never waits for the device."""
    _need_cuda(device)
    inputs, experts, _, stats = _made(device, dtype, case, backend, layout)
    call = (inputs.hidden, inputs.topk_ids, inputs.topk_weights, experts)
    before = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for own, rest in ((stats, {"mask": inputs.mask, "group": inputs.group}), (None, {})):
            rk.observe_layer(*call, own, **rest, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return "observed and unobserved, with mask and groups"


def cuda_graph(device: torch.device, backend: str, dtype: torch.dtype, case: Case) -> str:
    """A captured call replays to the same bits."""
    _need_cuda(device)
    inputs, experts, want, truth = _made(device, dtype, case, backend)
    stats = LayerStats(case.experts, case.groups, device)
    call = (inputs.hidden, inputs.topk_ids, inputs.topk_weights, experts, stats)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize(device)
    with torch.cuda.graph(graph):
        out = rk.observe_layer(*call, mask=inputs.mask, group=inputs.group, backend=backend)
    graph.replay()
    torch.cuda.synchronize(device)
    problems = _same(out, stats, want, truth)
    graph.replay()
    torch.cuda.synchronize(device)
    if not torch.equal(stats.count, 2 * truth.count):
        problems.append("a second replay does not add as much as the first")
    return _expect(problems, "captured, replayed twice")


def other_stream(device: torch.device, backend: str, dtype: torch.dtype, case: Case) -> str:
    """A call on a stream of its own, behind work that delays its input."""
    _need_cuda(device)
    inputs, experts, want, truth = _made(device, dtype, case, backend)
    stream = torch.cuda.Stream(device)
    delayed = torch.zeros_like(inputs.hidden)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a kernel on any other stream would read the zeros
        delayed.copy_(inputs.hidden)
        out, stats = observe(replace(inputs, hidden=delayed), experts, backend, case.groups)
    torch.cuda.synchronize(device)
    return _expect(_same(out, stats, want, truth), "behind delayed work")


def last_device(device: torch.device, backend: str, dtype: torch.dtype, case: Case) -> str:
    """A call on the last device, while the first is current."""
    _need_cuda(device)
    count = torch.cuda.device_count()
    if count < 2:
        raise NotHere("one device only")
    _, _, want, truth = _made(device, dtype, case, backend)
    with torch.cuda.device(0):
        _, _, out, stats = _made(torch.device("cuda", count - 1), dtype, case, backend)
    return _expect(_same(out.to(device), stats.to(device), want, truth), f"device {count - 1}")


def compiled(device: torch.device, backend: str, dtype: torch.dtype, case: Case) -> str:
    """`torch.compile(fullgraph=True)` gives the same bits."""
    inputs, experts, want, truth = _made(device, dtype, case, backend)

    def layer(hidden: Tensor, ids: Tensor, weights: Tensor, stats: LayerStats) -> Tensor:
        return rk.observe_layer(
            hidden,
            ids,
            weights,
            experts,
            stats,
            mask=inputs.mask,
            group=inputs.group,
            backend=backend,
        )

    stats = LayerStats(case.experts, case.groups, device)
    compiler = "inductor" if device.type == "cuda" else "aot_eager"  # here for speed
    run = torch.compile(layer, fullgraph=True, backend=compiler)
    out = run(inputs.hidden, inputs.topk_ids, inputs.topk_weights, stats)
    return _expect(_same(out, stats, want, truth), f"fullgraph, {compiler}")


def wide_offsets(device: torch.device, backend: str, dtype: torch.dtype, case: Case) -> str:
    """More than 2^31 elements of expert outputs at once, on sampled tokens against float64."""
    inputs = make_inputs(case, dtype, device=device)
    experts = make_experts(case, dtype=dtype, device=device)
    out, stats = observe(inputs, experts, backend, chunk=case.tokens)
    last = case.tokens - 1
    at = torch.tensor([0, 1, last // 3, last // 2, last - 1, last], device=device)
    few = Inputs(inputs.hidden[at], inputs.topk_ids[at], inputs.topk_weights[at], None, 0)
    want, _ = observe(few, experts, "reference")
    products = products_of(backend, inputs.hidden, case.top_k, experts)
    bounds, problems = bounds_of(dtype, products), []
    error = relative_error(out[at], want)
    if not error <= bounds.output:
        problems.append(f"sampled outputs are off by {error:.1e}")
    assert stats is not None
    counts = torch.bincount(inputs.topk_ids.flatten(), minlength=case.experts)
    weights = torch.zeros(case.experts, dtype=torch.float64, device=device)
    weights.index_add_(0, inputs.topk_ids.flatten(), inputs.topk_weights.flatten().double())
    if not torch.equal(stats.count[0], counts):
        problems.append("counts differ")
    if not largest_relative_error(stats.router_weight_sum[0], weights) <= 1e-9:
        problems.append("router_weight_sum differs")
    elements = case.tokens * case.top_k * case.hidden
    return _expect(problems, f"{elements} elements of y; output {error:.1e}")


def memory(device: torch.device, backend: str, dtype: torch.dtype, case: Case) -> str:
    """What a call allocates beside its output: y and h by slot, and 128 bytes per slot."""
    _need_cuda(device)
    inputs, experts, _, _ = _made(device, dtype, case, backend)
    stats = LayerStats(case.experts, case.groups, device)
    call = (inputs.hidden, inputs.topk_ids, inputs.topk_weights, experts, stats)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    out = rk.observe_layer(*call, chunk=case.tokens, backend=backend)
    torch.cuda.synchronize(device)
    used = torch.cuda.max_memory_allocated(device) - before - out.nbytes
    h, i = case.hidden, case.intermediate
    # grouped_mm also gathers its rows and keeps both halves of the first product.
    products = products_of(backend, inputs.hidden, case.top_k, experts)
    width = {"triton": h + i, "grouped_mm": 2 * h + 3 * i}[products]
    slots = case.tokens * case.top_k
    allowed = slots * (width * dtype.itemsize + 128) + _SLACK
    found = f"{used / 2**20:.1f} MiB of scratch, {allowed / 2**20:.1f} allowed"
    return _expect([] if used <= allowed else [found], found)


def chunked(device: torch.device, backend: str, dtype: torch.dtype, case: Case) -> str:
    """Parts of equal tokens: the same output bits, sums within 1e-12."""
    inputs = make_inputs(case, dtype, device=device)
    experts = make_experts(case, dtype=dtype, device=device)
    whole, truth = observe(inputs, experts, backend, case.groups, chunk=case.tokens)
    out, stats = observe(inputs, experts, backend, case.groups, chunk=case.tokens // 3 + 1)
    assert stats is not None
    assert truth is not None
    problems = [] if torch.equal(out, whole) else ["the output has other bits"]
    ours, theirs = stats.fields(), truth.fields()
    problems += [f"{n} differs" for n in (*COUNTS, "tokens") if not ours[n].equal(theirs[n])]
    worst = max(largest_relative_error(ours[name], theirs[name]) for name in SUMS)
    if not worst <= 1e-12:
        problems.append(f"sums move by {worst:.1e}")
    return _expect(problems, f"sums move by {worst:.1e}")


def plan(smoke: bool) -> list[Check]:
    """The facts, of every backend, in bf16."""
    case, wide = (_SMOKE_FACT, _SMOKE_WIDE) if smoke else (FACT, WIDE)
    # Groups by token are checked by reading them on the CPU, which no graph can hold.
    named = [
        ("no host sync", no_host_sync, case),
        ("no host sync, per-expert", partial(no_host_sync, layout="per-expert"), case),
        ("CUDA graph", cuda_graph, case),
        ("other stream", other_stream, case),
        ("last device", last_device, case),
        ("torch.compile", compiled, replace(case, groups=1)),
        ("2^31 elements", wide_offsets, wide),
        ("memory", memory, MEMORY),
        ("chunked", chunked, case),
    ]
    return [
        Check(name, backend, torch.bfloat16, run, (own,))
        for name, run, own in named
        for backend in BACKENDS
    ]
