"""Parts of a layer that are timed on their own, each with the check that comes before its timing.

Every part reads and writes what it does within a layer, at addresses of its own in each of several
calls, so that a call finds nothing of the call before in the L2 cache.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

import reap_kernels as rk
from bench.gpu.machine import Machine
from bench.gpu.verify import Bounds, CheckFailed, NotHere, bounds_of, differences
from reap_kernels import LayerStats
from reap_kernels.dispatch import Request, Sizes, select
from reap_kernels.quantized import Quantized
from reap_kernels.saliency.measures import TILE, SlotMeasures, StageKernels
from reap_kernels.saliency.stage_kernels import accumulate, stage_kernels
from reap_kernels.sort.slots import SortedSlots
from reap_kernels.testing import Case, largest_relative_error, make_quantized, relative_error

DTYPE = torch.bfloat16
# Calls together move this many times the L2 cache.
_ROTATED = 1.5
_MOST_CALLS = 256
# Tokens, or rows, whose results are compared with float64 where all of them would be too many.
_SAMPLE = 16
# Rounding the combination once to bf16, and norms accumulated in float32.
_OUTPUT, _NORM = 4e-3, 1e-5
# Sums of given numbers are float64 on both sides; only their order differs.
_EXACT = Bounds(1e-9, 1e-9, 1e-9)


@dataclass(frozen=True)
class Prepared:
    """A part ready to run.

    Attributes:
        calls: one a set of inputs.
        verify: the error found; raises CheckFailed where it is too large.
        moved: bytes that a call must read and write at least.
        captured: whether the calls are timed as a CUDA graph, without the host's part.
    """

    calls: Sequence[Callable[[], object]]
    verify: Callable[[], float]
    moved: int
    captured: bool = True


@dataclass(frozen=True)
class Part:
    """One entry: `prepare()` raises NotHere, BackendUnavailable or OutOfMemoryError.

    Attributes:
        case: sizes; of a dequantization E, N (as intermediate) and K (as hidden).
        name, variant: what is timed, and the backend of its kernels.
        prepare: makes inputs and calls.
    """

    case: Case
    name: str
    variant: str
    prepare: Callable[[], Prepared]


class Bed:
    """Inputs of one shape and length, the same for every variant: balanced random routing."""

    def __init__(self, machine: Machine, case: Case) -> None:
        self.machine, self.case, self.device = machine, case, machine.device
        self.slots = case.tokens * case.top_k
        self.rng = torch.Generator(self.device).manual_seed(2)
        logits = self._normal(case.tokens, case.experts, torch.float32)
        weights, ids = logits.softmax(dim=-1).topk(case.top_k, dim=-1)
        self._ids, self._weights = (
            ids,
            (weights / weights.sum(dim=-1, keepdim=True)).to(DTYPE),
        )

    def _normal(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        size = (rows, columns)
        return torch.randn(size, generator=self.rng, device=self.device, dtype=dtype)

    def calls(self, moved: int) -> int:
        """Sets of inputs to take in turn where each call moves so many bytes."""
        needed = -(-int(_ROTATED * self.machine.cache_bytes) // moved)
        return max(1, min(needed, 2 if self.machine.smoke else _MOST_CALLS))

    def routed(self, sets: int) -> list[tuple[Tensor, Tensor]]:
        """ids and weights of each set, in memory of their own."""
        return [(self._ids.roll(n, 0), self._weights.roll(n, 0)) for n in range(sets)]

    def sorted(self, around: StageKernels, sets: int) -> list[tuple[Tensor, SortedSlots]]:
        """Gates and sorted slots of each set."""
        experts = self.case.experts
        return [(weights, around.sort(ids, weights, experts)) for ids, weights in self.routed(sets)]

    @cached_property
    def outputs(self) -> list[Tensor]:
        """y [S, H] of each set."""
        size = self.slots * self.case.hidden * DTYPE.itemsize
        sets, free = self.calls(size), self.machine.free_bytes()
        if sets * size > free // 2:
            raise NotHere(f"expert outputs take {size / 1e9:.1f} GB; {free / 1e9:.1f} GB are free")
        return [self._normal(self.slots, self.case.hidden, DTYPE) for _ in range(sets)]

    @cached_property
    def measures(self) -> list[SlotMeasures]:
        """Norms and extrema of as many sets as rotate past the cache."""
        sets = self.calls(self.slots * 22)
        three = (self._normal(3, self.slots, torch.float32).abs() for _ in range(sets))
        return [SlotMeasures(*(row.clone() for row in rows)) for rows in three]

    def sample(self, count: int) -> Tensor:
        """Some of `count` tokens or rows, the first and the last among them."""
        steps = range(_SAMPLE)
        at = sorted({(count - 1) * step // (_SAMPLE - 1) for step in steps})
        return torch.tensor(at, device=self.device)

    def stats(self) -> LayerStats:
        """Empty statistics."""
        return LayerStats(self.case.experts, device=self.device)


def _same_order(bed: Bed, rows: SortedSlots, ids: Tensor) -> None:
    """Raises unless slots are sorted stably."""
    flat = ids.flatten()
    ends = torch.bincount(flat, minlength=bed.case.experts).cumsum(0)
    want = torch.argsort(flat, stable=True)
    if not (torch.equal(rows.gather_index, want) and torch.equal(rows.offsets[1:], ends)):
        raise CheckFailed("slots are not sorted stably")
    if not torch.equal(rows.scatter_index[want], torch.arange(len(want), device=bed.device)):
        raise CheckFailed("`scatter_index` is not the inverse of `gather_index`")


def _route(bed: Bed, around: StageKernels) -> Prepared:
    experts = bed.case.experts
    moved = bed.slots * (8 + DTYPE.itemsize + 16) + 8 * (experts + 1)
    inputs = bed.routed(bed.calls(moved))
    calls = [partial(around.sort, ids, weights, experts) for ids, weights in inputs]

    def verify() -> float:
        _same_order(bed, calls[0](), inputs[0][0])
        return 0.0

    return Prepared(calls, verify, moved)


def _tiles(bed: Bed, around: StageKernels) -> Prepared:
    (_, rows), *_ = bed.sorted(around, 1)
    experts, sizes = bed.case.experts, rows.offsets.diff()
    numbers = -(-sizes // TILE)
    used = int(numbers.sum())
    moved = 12 * (experts + 1) + 8 * used
    offsets = [rows.offsets.clone() for _ in range(bed.calls(moved))]
    calls = [partial(rows.schedule, own, bed.slots, TILE) for own in offsets]

    def verify() -> float:
        tiles = calls[0]()
        first = numbers.cumsum(0) - numbers
        owner = torch.arange(experts, device=bed.device).repeat_interleave(numbers)
        within = torch.arange(used, device=bed.device) - first[owner]
        found = (tiles.firsts[-1:], tiles.firsts[:-1], tiles.experts[:used], tiles.rows[:used])
        want = (numbers.sum()[None], first, owner, rows.offsets[owner] + TILE * within)
        if not all(torch.equal(a.long(), b) for a, b in zip(found, want, strict=True)):
            raise CheckFailed("the tile list differs")
        return 0.0

    return Prepared(calls, verify, moved)


def _combine(observed: bool, bed: Bed, around: StageKernels) -> Prepared:
    case, outputs = bed.case, bed.outputs
    held = bed.sorted(around, len(outputs))
    written = around.written(DTYPE)
    out = torch.empty(case.tokens, case.hidden, dtype=written, device=bed.device)
    into = SlotMeasures.empty(bed.slots, bed.device) if observed else None
    calls = [
        partial(around.combine, y, weights, rows, out, into)
        for y, (weights, rows) in zip(outputs, held, strict=True)
    ]

    def verify() -> float:
        calls[0]()
        at, (weights, rows) = bed.sample(case.tokens), held[0]
        slots = (at[:, None] * case.top_k + torch.arange(case.top_k, device=bed.device)).flatten()
        y = outputs[0][rows.scatter_index[slots]].double()
        scaled = weights[at].double()[:, :, None] * y.view(len(at), case.top_k, case.hidden)
        error = relative_error(out[at].to(DTYPE), scaled.sum(dim=1))
        if not error <= _OUTPUT:
            raise CheckFailed(f"the output is off by {error:.1e}, {_OUTPUT:.0e} is allowed")
        if into is None:
            return error
        norm = largest_relative_error(into.norm[slots], y.norm(dim=1))
        if not norm <= _NORM:
            raise CheckFailed(f"norms are off by {norm:.1e}, {_NORM:.0e} is allowed")
        extrema = torch.stack([into.high[slots], into.low[slots]]).double()
        if not torch.equal(extrema, torch.stack([y.amax(dim=1), y.amin(dim=1)])):
            raise CheckFailed("largest or smallest elements differ")
        return error

    size = DTYPE.itemsize
    moved = (bed.slots + case.tokens) * case.hidden * size + bed.slots * (8 + size)
    return Prepared(calls, verify, moved + (12 * bed.slots if observed else 0))


def _added(bed: Bed, measures: SlotMeasures, ids: Tensor, weights: Tensor) -> LayerStats:
    """What `measures` add to empty statistics, in float64."""
    want, flat = bed.stats(), ids.flatten()
    want.counts[0, 0] = torch.bincount(flat, minlength=bed.case.experts)
    gate, norm = weights.flatten().double(), measures.norm.double()
    for row, values in enumerate((gate, norm, gate * norm, norm**2, (gate * norm) ** 2)):
        want.sums[row, 0].index_add_(0, flat, values)
    for row, (values, how) in enumerate(((measures.high, "amax"), (measures.low, "amin"))):
        want.extrema[row, 0].scatter_reduce_(0, flat, values, how)
    return want


def _expect(got: LayerStats, want: LayerStats, bounds: Bounds) -> float:
    problems, error = differences(got, want, bounds)
    if problems:
        raise CheckFailed("; ".join(problems))
    return error


def _statistics_bytes(experts: int) -> int:
    """Read and written: 2 counts and 5 sums of 8 bytes and 2 extrema of 4 an expert."""
    return 2 * 64 * experts


def _reduce(bed: Bed, around: StageKernels) -> Prepared:
    held = bed.sorted(around, len(bed.measures))
    for _, rows in held:
        rows.tiles(TILE)  # the products of a layer have made the list already
    total = bed.stats()

    def call(n: int, stats: LayerStats = total) -> None:
        weights, rows = held[n]
        around.reduce(bed.measures[n], weights, rows, stats, None, 0, TILE)

    def verify() -> float:
        got = bed.stats()
        call(0, got)
        ids, weights = bed.routed(1)[0]
        return _expect(got, _added(bed, bed.measures[0], ids, weights), _EXACT)

    moved = bed.slots * (8 + DTYPE.itemsize + 12) + _statistics_bytes(bed.case.experts)
    return Prepared([partial(call, n) for n in range(len(held))], verify, moved)


def _around(bed: Bed, around: StageKernels) -> Prepared:
    """All that observing needs beside products and combination."""
    inputs, total = bed.routed(len(bed.measures)), bed.stats()

    def call(n: int, stats: LayerStats = total) -> None:
        ids, weights = inputs[n]
        rows = around.sort(ids, weights, bed.case.experts)
        around.reduce(bed.measures[n], weights, rows, stats, None, 0, TILE)

    def verify() -> float:
        got = bed.stats()
        call(0, got)
        return _expect(got, _added(bed, bed.measures[0], *inputs[0]), _EXACT)

    size = DTYPE.itemsize
    # `gather_index` and `weights` are read again by the reduction.
    moved = bed.slots * (8 + size + 16 + 8 + size + 12) + _statistics_bytes(bed.case.experts)
    return Prepared([partial(call, n) for n in range(len(inputs))], verify, moved)


def _accumulate(bed: Bed, around: StageKernels) -> Prepared:
    inputs, total = bed.routed(len(bed.outputs)), bed.stats()

    def call(n: int, stats: LayerStats = total, mask: Tensor | None = None) -> None:
        ids, weights = inputs[n]
        accumulate(around, bed.outputs[n], ids.flatten(), weights.flatten(), stats, mask, 0)

    def verify() -> float:
        at = bed.sample(bed.slots)
        mask = torch.zeros(bed.slots, dtype=torch.bool, device=bed.device)
        mask[at] = True
        got, want = bed.stats(), bed.stats()
        call(0, got, mask)
        ids, weights = (tensor.flatten()[at] for tensor in inputs[0])
        rk.accumulate(bed.outputs[0][at], ids, weights, want, backend="reference")
        return _expect(got, want, bounds_of(torch.float32, ""))

    row = bed.case.hidden * DTYPE.itemsize + 8 + DTYPE.itemsize
    moved = bed.slots * row + _statistics_bytes(bed.case.experts)
    return Prepared([partial(call, n) for n in range(len(inputs))], verify, moved)


OBSERVED, UNOBSERVED, AROUND = "combine observed", "combine unobserved", "sort + saliency"
_PARTS: dict[str, Callable[[Bed, StageKernels], Prepared]] = {
    "sort": _route,
    "tile list": _tiles,
    OBSERVED: partial(_combine, True),
    UNOBSERVED: partial(_combine, False),
    "reduce": _reduce,
    AROUND: _around,
    "accumulate": _accumulate,
}


def of_layer(bed: Bed, backends: Sequence[str]) -> list[Part]:
    """Every part of a layer around its products, by every backend."""
    case = bed.case
    sizes = Sizes(case.tokens, case.top_k, case.experts, case.hidden, case.intermediate)

    def prepared(make: Callable[[Bed, StageKernels], Prepared], backend: str) -> Prepared:
        for op in ("sort", "saliency"):  # runs self-checks, or says why it does not serve
            select(Request(op, bed.device, DTYPE, sizes=sizes), backend)
        return make(bed, stage_kernels(backend, backend))

    return [
        Part(case, name, backend, partial(prepared, make, backend))
        for name, make in _PARTS.items()
        for backend in backends
    ]


def _dequantize(machine: Machine, case: Case, format: str, backend: str) -> Prepared:
    """A chunk of experts, which are copies of one: codes of one expert are random enough."""
    one = make_quantized(format, 1, case.intermediate, case.hidden)
    values, scales = (
        tensor.to(machine.device).repeat(case.experts, 1, 1) for tensor in one.tensors()
    )
    made = Quantized(values, scales, format, one.block)
    out = torch.empty(made.shape, dtype=made.dtype, device=machine.device)
    # The op's own choice of backend, so that a refusal or a failed self-check is met here.
    call = partial(rk.dequantize, made, out=out, backend=backend)

    def verify() -> float:
        out.fill_(7)
        call()
        want = one[0].view(torch.int16)
        for expert in (0, case.experts - 1):
            if not torch.equal(out[expert].cpu().view(torch.int16), want):
                raise CheckFailed(f"expert {expert} has other bits than the reference's")
        return 0.0

    moved = made.values.nbytes + made.scales.nbytes + out.nbytes
    return Prepared([call], verify, moved, captured=backend != "reference")


def of_formats(
    machine: Machine, shapes: Sequence[tuple[Case, str]], backends: Sequence[str]
) -> list[Part]:
    """Dequantization of every shape and format, by every backend."""
    return [
        Part(
            case, f"dequantize {name}", backend, partial(_dequantize, machine, case, name, backend)
        )
        for case, name in shapes
        for backend in backends
    ]
