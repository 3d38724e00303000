"""Launches every CUDA kernel in every variant, small, and compares each result with float64.

`python -m tests.gpu.variants [cuda | cpu] [small]`: what `tests.gpu.sanitize` runs under
compute-sanitizer, and by itself a check; `small` is one small variant of each kernel, `cpu` where
REAP_CUDA_HOST names the kernels compiled for the CPU. Inputs are made on the CPU and results read
there, so that on the device next to nothing runs but our kernels.
"""

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

import reap_kernels as rk
from bench.gpu.verify import CheckFailed, NotHere
from reap_kernels import LayerStats, cuda
from reap_kernels.dequant import kernel_cuda as dequant
from reap_kernels.experts import kernel_cuda
from reap_kernels.layer import kernel_cuda as layer
from reap_kernels.layer.call import LayerCall
from reap_kernels.quantized import FORMATS, Quantized
from reap_kernels.saliency import kernel_cuda as saliency
from reap_kernels.saliency.measures import SlotMeasures
from reap_kernels.sort import kernel_cuda as route
from reap_kernels.sort.slots import SortedSlots
from reap_kernels.stats import COUNTS, EXTREMA, SUMS
from reap_kernels.testing import (
    ACTIVATIONS,
    Case,
    Inputs,
    largest_relative_error,
    make_experts,
    make_inputs,
    make_quantized,
    relative_error,
)
from tests.gpu import products

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
# One rounding of sums that accumulate in float32; of norms, a few of float32.
_OUTPUT = {torch.float32: 3e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}
_SUMS = 5e-7
# Outputs of whole layers, which round h and y as well.
_WHOLE = {torch.float16: 1e-3, torch.bfloat16: 5e-3}
# Slots per token around every kernel there is; widths of 16-byte rows, and of others.
SLOTS = (1, 2, 3, 4, 5, 8, 10, 16, 22, 32)
WIDTHS = (8, 2056, 33, 257)
# Experts whose counters four warps share in shared memory, those of which one has room, the most.
EXPERTS = (1, 40, 1024, 2457, 4095)
_BASE = Case("", "", tokens=6, experts=33, hidden=8, intermediate=1, foreign=0.2, zero_weights=0.1)


@dataclass(frozen=True)
class Variant:
    """One launch, or a few; `run(device)` raises CheckFailed where a result is wrong.

    Attributes:
        small: whether it is the one of its kernels that the slowest tools run.
    """

    name: str
    run: Callable[[torch.device], None]
    small: bool = False


def _expect(right: bool, what: str) -> None:
    if not right:
        raise CheckFailed(what)


def _sorted(
    ids: Tensor, router_weights: Tensor | None, experts: int, where: torch.device
) -> tuple[SortedSlots, Tensor]:
    """Slots sorted on the device and compared with the CPU's; the latter's order."""
    weights = None if router_weights is None else router_weights.to(where)
    rows = route.sort_slots(ids.to(where), weights, experts)
    want = rk.sort_by_expert(ids, experts, topk_weights=router_weights, backend="reference")
    order = rows.gather_index.cpu()
    _expect(torch.equal(order, want.gather_index), "gather_index differs")
    _expect(torch.equal(rows.offsets.cpu(), want.offsets), "offsets differ")
    every = torch.arange(ids.numel())
    _expect(torch.equal(rows.scatter_index.cpu()[order], every), "scatter_index differs")
    return rows, order


def _route(
    tokens: int,
    experts: int,
    dtype: torch.dtype,
    router_weights: torch.dtype | None,
    where: torch.device,
) -> None:
    rng = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-1, experts + 1, (tokens, 2), generator=rng).to(dtype)
    weights = None
    if router_weights is not None:
        weights = torch.randint(0, 3, (tokens, 2), generator=rng).to(router_weights)
    rows, _ = _sorted(ids, weights, experts, where)
    for block_m in (16, 128):
        tiles = rows.tiles(block_m)
        sizes = rows.offsets.cpu().diff()
        firsts = torch.cat([torch.zeros(1).long(), (-(-sizes // block_m)).cumsum(0)])
        _expect(torch.equal(tiles.firsts.cpu().long(), firsts), "tiles differ")
        used = int(firsts[-1])
        owner = torch.arange(experts).repeat_interleave(firsts.diff())
        starts = rows.offsets.cpu()[owner] + block_m * (torch.arange(used) - firsts[owner])
        _expect(torch.equal(tiles.experts[:used].cpu().long(), owner), "tiles' experts differ")
        _expect(torch.equal(tiles.rows[:used].cpu().long(), starts), "tiles' rows differ")


def _want(case: Case, inputs: Inputs, y: Tensor) -> tuple[Tensor, LayerStats]:
    """Output and statistics in float64, from the formulas."""
    ids, router_weights = inputs.topk_ids.flatten(), inputs.topk_weights.flatten()
    served = (ids >= 0) & (ids < case.experts) & (router_weights != 0)
    scaled = torch.where(served[:, None], router_weights.double()[:, None] * y.double(), 0)
    every = {"mask": inputs.mask, "group": inputs.group}
    rows = {k: v.repeat_interleave(case.top_k) for k, v in every.items() if isinstance(v, Tensor)}
    stats = LayerStats(case.experts, case.groups)
    rk.accumulate(y, ids, router_weights, stats, **rows, backend="reference")
    return scaled.view(case.tokens, case.top_k, case.hidden).sum(dim=1), stats


def _same(got: LayerStats, want: LayerStats) -> None:
    ours, theirs = got.to("cpu").fields(), want.fields()
    for name in (*COUNTS, *EXTREMA):
        _expect(torch.equal(ours[name], theirs[name]), f"{name} differs")
    for name in SUMS:
        error = largest_relative_error(ours[name], theirs[name])
        _expect(error <= _SUMS, f"{name} is off by {error:.1e}")


def _layer(
    case: Case, dtype: torch.dtype, router_weights: torch.dtype, tile: int, where: torch.device
) -> None:
    """Combination, observed and not, and reduction."""
    made = make_inputs(case, dtype)
    made = replace(made, topk_weights=made.topk_weights.to(router_weights))
    rng = torch.Generator().manual_seed(3)
    y = torch.randn(made.topk_ids.numel(), case.hidden, generator=rng).to(dtype)
    there = made.to(where)
    rows, order = _sorted(made.topk_ids, made.topk_weights, case.experts, where)
    sorted_y = y[order].to(where)
    want, truth = _want(case, made, y)
    for observed in (True, False):
        out = torch.empty(case.tokens, case.hidden, dtype=dtype, device=where)
        measures = SlotMeasures.empty(len(y), where) if observed else None
        saliency.combine(sorted_y, there.topk_weights, rows, out, measures)
        error = relative_error(out.cpu(), want)
        _expect(error <= _OUTPUT[dtype], f"the output is off by {error:.1e}")
        if measures is not None:
            stats = LayerStats(case.experts, case.groups, where)
            call = (measures, there.topk_weights, rows, stats, there.mask, there.group, tile)
            saliency.reduce_slots(*call)
            _same(stats, truth)


def _norms(width: int, dtype: torch.dtype, shifted: bool, where: torch.device) -> None:
    """Measures of rows a host brings: no combination; rows may begin anywhere."""
    rng = torch.Generator().manual_seed(5)
    flat = torch.randn(30 * width + 1, generator=rng).to(dtype).to(where)
    y = (flat[1:] if shifted else flat[:-1]).view(30, width)
    router_weights = torch.ones(30, 1, dtype=dtype).to(where)
    measures = SlotMeasures.empty(30, where)
    saliency.combine(y, router_weights, None, None, measures)
    rows = y.cpu().double()
    error = largest_relative_error(measures.norm.cpu(), rows.norm(dim=1))
    _expect(error <= _SUMS, f"norms are off by {error:.1e}")
    found, true = (measures.high, measures.low), (rows.amax(dim=1), rows.amin(dim=1))
    for own, want in zip(found, true, strict=True):
        _expect(torch.equal(own.cpu(), want.float()), "extrema differ")


def _dequantize(made: Quantized, skipping: bool, where: torch.device) -> None:
    experts = len(made)
    want = torch.stack(list(made))
    offsets = None
    if skipping:
        offsets = torch.arange(experts + 1) // 2  # every second expert has a row
        want[offsets.diff() == 0] = 7
    got = torch.full_like(want, 7).to(where)
    dequant.dequantize(made.to(where), None if offsets is None else offsets.to(where), got)
    _expect(torch.equal(got.cpu().view(torch.int16), want.view(torch.int16)), "bits differ")


def _routes() -> Iterator[Variant]:
    few, most = EXPERTS[:3], EXPERTS[3:]
    sizes = [*itertools.product((0, 1, 128, 129, 350), few), *itertools.product((0, 129), most)]
    for tokens, experts in sizes:
        run = partial(_route, tokens, experts, torch.int64, torch.bfloat16)
        name = f"route of {tokens} tokens to {experts} experts"
        yield Variant(name, run, small=(tokens, experts) == (129, 40))
    for dtype, router_weights in itertools.product(cuda.INTEGERS, (None, *cuda.FLOATS)):
        yield Variant(
            f"route of {dtype} by {router_weights}", partial(_route, 70, 9, dtype, router_weights)
        )


def _layers() -> Iterator[Variant]:
    for k, width, dtype in itertools.product(SLOTS, WIDTHS, FLOATS):
        case = replace(_BASE, top_k=k, hidden=width)
        small = (k, width, dtype) == (8, 8, FLOATS[0])
        run = partial(_layer, case, dtype, dtype, 64)
        yield Variant(f"layer of k={k} H={width} {dtype}", run, small)
    for groups, masked, router_weights in itertools.product((1, 3), (0.0, 0.4), cuda.FLOATS):
        case = replace(_BASE, tokens=150, experts=3, top_k=2, groups=groups, masked=masked)
        name = f"layer of {groups} groups, {masked} masked, router_weights {router_weights}"
        yield Variant(name, partial(_layer, case, torch.float32, router_weights, 16))
    for case in (replace(_BASE, tokens=0), replace(_BASE, tokens=300, skew="one")):
        yield Variant(f"layer of {case.tokens} tokens", partial(_layer, case, *FLOATS[1:], 128))


def _others() -> Iterator[Variant]:
    for width, dtype, shifted in itertools.product((8, 9, 2056), cuda.FLOATS, (False, True)):
        run = partial(_norms, width, dtype, shifted)
        yield Variant(f"norms of {width} {dtype}", run, small=width == 9 and shifted)
    # Several blocks of threads and a partial one; rows that begin anywhere, which only FP8 has.
    for name, (packed, _, scaled) in FORMATS.items():
        sizes = ((3, 200, 416), (3, 35, 75)) if packed == 1 else ((3, 200, 416),)
        for size, scales, skipping in itertools.product(sizes, scaled, (False, True)):
            made = make_quantized(name, *size, scales=scales)
            run = partial(_dequantize, made, skipping)
            yield Variant(f"{name} {size} {scales}", run, small=skipping and size[1] == 200)


def _product(
    case: Case, layout: str, activation: rk.Activation, dtype: torch.dtype, where: torch.device
) -> None:
    """Both products of an expert, where the GPU is a Hopper."""
    try:
        errors = products.compare(case, layout, activation, dtype, where)
    except NotHere as reason:
        print(f"not run: {reason}")
        return
    products.expect_within(errors, dtype)


def _whole(case: Case, layout: str, dtype: torch.dtype, where: torch.device) -> None:
    """A layer in one call, observed and not, where the GPU is a Hopper."""
    reason = kernel_cuda.device_refusal(where)
    if reason is not None:
        print(f"not run: {reason}")
        return
    made, experts = make_inputs(case, dtype), make_experts(case, layout, dtype=dtype)
    routed = (made.hidden, made.topk_ids, made.topk_weights)
    rest = {"mask": made.mask, "group": made.group}
    truth = LayerStats(case.experts, case.groups)
    want = rk.observe_layer(*routed, experts, truth, **rest, backend="reference")
    there, own = made.to(where), make_experts(case, layout, dtype=dtype, device=where)
    routed = (there.hidden, there.topk_ids, there.topk_weights, own)
    stats = LayerStats(case.experts, case.groups, where)
    for kept in (stats, None):
        out = layer.observe_layer(LayerCall(*routed, kept, there.mask, there.group))
        error = relative_error(out.cpu(), want)
        _expect(error <= _WHOLE[dtype], f"the output is off by {error:.1e}")
    counts = stats.to("cpu").fields()
    for name in COUNTS:
        _expect(torch.equal(counts[name], truth.fields()[name]), f"{name} differs")


def _wholes() -> Iterator[Variant]:
    for layout, dtype in itertools.product(("stacked", "per-expert", "ungated"), _WHOLE):
        case = replace(products.SIZES, groups=2, masked=0.3)
        small = (layout, dtype) == ("stacked", torch.bfloat16)
        run = partial(_whole, case, layout, dtype)
        yield Variant(f"whole layer of {layout} {dtype}", run, small)


def _products() -> Iterator[Variant]:
    for activation, dtype in itertools.product(ACTIVATIONS, products.BOUNDS):
        layouts = (
            ("stacked", "interleaved-biased", "per-expert") if activation.gated else ("ungated",)
        )
        for layout in layouts:
            run = partial(_product, products.SIZES, layout, activation, dtype)
            small = dtype == torch.bfloat16 and activation.kind == "silu" and layout == "stacked"
            yield Variant(f"products of {layout} {activation.kind} {dtype}", run, small)
    yield Variant(
        "products of full tiles",
        partial(_product, products.ONE, "stacked", ACTIVATIONS[0], torch.bfloat16),
    )


def every() -> Iterator[Variant]:
    """All variants, small."""
    return itertools.chain(_routes(), _layers(), _others(), _products(), _wholes())


def main(arguments: Sequence[str]) -> int:
    """Runs all on a device; 0, or 1 where a result is wrong."""
    words = list(arguments)
    small = "small" in words
    where = torch.device(next((word for word in words if word != "small"), "cuda"))
    number = wrong = 0
    for variant in every():
        if small and not variant.small:
            continue
        number += 1
        try:
            variant.run(where)
        except CheckFailed as error:
            wrong += 1
            print(f"wrong: {variant.name}: {error}")
    print(f"{number} variants on {where}, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
