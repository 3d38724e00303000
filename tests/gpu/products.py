"""The CUDA products for Hopper on a GPU, alone and in a layer of one call, against float64."""

from dataclasses import replace

import torch
from torch import Tensor

from bench.gpu.verify import CheckFailed, NotHere
from reap_kernels.activation import Activation
from reap_kernels.experts import kernel_cuda as products
from reap_kernels.experts.kernel_cuda import Half
from reap_kernels.sort import kernel_cuda as route
from reap_kernels.sort.slots import SortedSlots
from reap_kernels.testing import ACTIVATIONS, Case, make_experts, make_inputs, relative_error
from tests.gpu import checks as layers
from tests.gpu import facts
from tests.gpu.checks import Check, poisoned

NAME = "wgmma"
# What rounding the results costs, and sums of products in float32 with it.
BOUNDS = {torch.bfloat16: 2.5e-3, torch.float16: 4e-4}
LAYOUTS = ("stacked", "interleaved-biased", "ungated", "per-expert")
# Widths that fill no tile; experts with no rows, with few, and (one) with more than a tile has.
SIZES = Case("sizes", "multiples of 8 alone", 60, 5, 2, 136, 72, "zipf", foreign=0.2)
ONE = Case("one", "tiles of two widths, most experts empty", 300, 4, 2, 72, 40, "one")
# More tiles than an H200 has multiprocessors, several times; every stage is used many times.
MANY = Case("many", "blocks with many tiles", 2000, 40, 4, 512, 1024, "zipf")
_FACTS = (facts.no_host_sync, facts.cuda_graph, facts.other_stream, facts.compiled, facts.chunked)


def _both(
    hidden: Tensor, rows: SortedSlots, first: tuple[Half, Half | None], down: Half, act: Activation
) -> tuple[Tensor, Tensor]:
    """h and y by sorted row."""
    up, gate = first
    h = products.product(hidden, up, rows, gate=gate, activation=act, gather=True)
    return h, products.product(h, down, rows)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Also of NaN, which is a wrong number and no race."""
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


def expect_within(errors: tuple[float, float], dtype: torch.dtype) -> None:
    """Raises CheckFailed where an error is above its bound, or NaN."""
    if not all(error <= BOUNDS[dtype] for error in errors):
        raise CheckFailed(f"h and y are off by {errors}, {BOUNDS[dtype]:.1e} is allowed")


def compare(
    case: Case, layout: str, activation: Activation | None, dtype: torch.dtype, where: torch.device
) -> tuple[float, float]:
    """Relative errors of h and of y, which is computed from h. Inputs are made and results judged
    on the CPU, so that on the device next to nothing runs but the products.

    Raises:
        NotHere: the kernels do not run on `where`.
        CheckFailed: a second run has other bits.
    """
    inputs, experts = make_inputs(case, dtype), make_experts(case, layout, activation, dtype)
    there = make_experts(case, layout, activation, dtype, device=where)
    first, down = products.first_halves(there), Half.of(there.down, there.down_bias)
    reason = products.refusal(where, *first) or products.refusal(where, down)
    if reason is not None:
        raise NotHere(reason)
    ids, weights = inputs.topk_ids.to(where), inputs.topk_weights.to(where)
    rows, hidden = route.sort_slots(ids, weights, case.experts), inputs.hidden.to(where)
    with poisoned():
        found = _both(hidden, rows, first, down, there.activation)
        again = _both(hidden, rows, first, down, there.activation)
    offsets, tokens = rows.offsets.tolist(), (rows.gather_index // rows.top_k).cpu()
    h, y = (own[: offsets[-1]].cpu() for own in found)
    if not all(
        _same_bits(own[: offsets[-1]].cpu(), one) for own, one in zip(again, (h, y), strict=True)
    ):
        raise CheckFailed("a second run has other bits")
    owners = list(zip(range(case.experts), offsets, offsets[1:], strict=False))
    x = inputs.hidden.double()[tokens]
    want_h = torch.cat([experts.inner(e, x[a:b]) for e, a, b in owners])
    want_y = torch.cat([experts.output(e, h.double()[a:b]) for e, a, b in owners])
    return relative_error(h, want_h), relative_error(y, want_y)


def equal_float64(
    device: torch.device,
    _: str,
    dtype: torch.dtype,
    case: Case,
    layout: str,
    activation: Activation | None,
) -> str:
    """Both products within their bounds, twice the same bits."""
    errors = compare(case, layout, activation, dtype, device)
    expect_within(errors, dtype)
    return f"h and y are off by {errors[0]:.1e} and {errors[1]:.1e}"


def in_graph(device: torch.device, _: str, dtype: torch.dtype, layout: str) -> str:
    """Captured products, whose tensor maps are parameters of the launch or in a table that the
    first call has uploaded, have the same bits.
    """
    experts = make_experts(SIZES, layout, dtype=dtype, device=device)
    inputs = make_inputs(SIZES, dtype)
    first, down = products.first_halves(experts), Half.of(experts.down, None)
    reason = products.refusal(device, *first)
    if device.type != "cuda" or reason is not None:
        raise NotHere(reason or "needs a CUDA device")
    there = inputs.to(device)
    rows = route.sort_slots(there.topk_ids, there.topk_weights, SIZES.experts)
    served = int(rows.offsets[-1])
    want = _both(there.hidden, rows, first, down, experts.activation)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = _both(there.hidden, rows, first, down, experts.activation)
    graph.replay()
    torch.cuda.synchronize(device)
    for own, one in zip(got, want, strict=True):
        if not _same_bits(own[:served], one[:served]):
            raise CheckFailed("a replay has other bits")
    return "the bits of direct launches"


def plan(smoke: bool) -> list[Check]:
    """Every layout and activation, tiles of every kind, many tiles, and a graph, in both dtypes; a
    layer's graph, streams, `torch.compile`, no synchronization, and a call in parts in bf16.
    """
    cases: list[tuple[Case, str, Activation | None]] = [(SIZES, layout, None) for layout in LAYOUTS]
    if smoke:
        dtypes = (torch.float16,)
        cases = [(replace(SIZES, tokens=8, experts=2), LAYOUTS[0], None)]
    else:
        dtypes = tuple(BOUNDS)
        cases += [(ONE, "stacked", None), (MANY, "stacked", None), (MANY, "per-expert", None)]
        cases += [
            (SIZES, "interleaved-biased" if own.gated else "ungated", own) for own in ACTIVATIONS
        ]
    checks = [
        Check(
            f"products, {case.name}, {layout}{f', {own.kind}' if own else ''}",
            NAME,
            dtype,
            equal_float64,
            (case, layout, own),
        )
        for case, layout, own in cases
        for dtype in dtypes
    ]
    checks += [
        Check(
            f"layer, {case.name}, {layout}{f', {own.kind}' if own else ''}",
            NAME,
            dtype,
            layers.compare,
            (case, layout, own),
        )
        for case, layout, own in cases
        for dtype in dtypes
    ]
    if not smoke:
        for fact in _FACTS:
            name = f"layer, {fact.__name__.replace('_', ' ')}"
            # Groups by token are checked by reading them on the CPU, which no graph can hold.
            case = replace(facts.FACT, groups=1) if fact is facts.compiled else facts.FACT
            checks.append(Check(name, NAME, torch.bfloat16, fact, (case,)))
    return checks + [
        Check(f"products in a CUDA graph, {layout}", NAME, dtype, in_graph, (layout,))
        for layout in ("stacked", "per-expert")
        for dtype in dtypes
    ]
