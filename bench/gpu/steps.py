"""Stage `steps`: how long each step of one layer takes inside it, by events between the steps.

The layer op's own code runs, with its kernels wrapped so that each ends with an event: `sort`,
`gate_up`, `down`, `combine`, `reduce`. A step's share is that of the sum of all steps; `layer_ms`
is the same call without events, timed in turn with it. Both are queued behind other work, so that
no time of the host's is in them.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest import mock

import torch

from bench.gpu import layer
from bench.gpu.clock import Deadline, behind, busy
from bench.gpu.layer import DTYPE, Row
from bench.gpu.machine import Machine
from bench.gpu.nvml import COLUMNS, Window
from bench.gpu.providers import Work
from bench.gpu.selection import PLANNED, Selection
from bench.gpu.verify import CheckFailed, bounds_of, products_of, timed_outcome
from reap_kernels import LayerStats
from reap_kernels.dispatch import select
from reap_kernels.experts import gpu as experts
from reap_kernels.experts.request import request_of
from reap_kernels.experts.triton_backend import launches
from reap_kernels.layer import gpu
from reap_kernels.layer.call import LayerCall
from reap_kernels.saliency.measures import StageKernels
from reap_kernels.saliency.stage_kernels import stage_kernels
from reap_kernels.testing import Case, relative_error

STEPS = ("sort", "gate_up", "down", "combine", "reduce")
BACKENDS = ("triton", "cuda")
ROUNDS, REPEATS = 3, 12
_SHAPES = ("Qwen3-30B-A3B", "DeepSeek-V3", "Qwen3.5-397B")
_TOKENS = (2048, 16384, 65536)
_FIGURES = ("calls", "ms", "ms_p20", "ms_p80", "share", "pct_peak", "pct_copy", "layer_ms")
_FIGURES += ("sum_ms", *COLUMNS)
_PRINTED = ("shape", "tokens", "routing", "variant", "step", "status", "ms", "share", "note")


def plan(smoke: bool) -> list[Case]:
    """Every layer call: each shape's lengths, balanced and Zipf's, before the next shape."""
    if smoke:
        return layer.plan(smoke)
    shapes = [next(shape for shape in layer.SHAPES if shape.name == name) for name in _SHAPES]
    return [
        replace(shape, tokens=tokens, skew=skew)
        for shape in shapes
        for tokens in _TOKENS
        for skew in ("balanced", "zipf")
    ]


def run(machine: Machine, deadline: Deadline, selection: Selection = PLANNED) -> list[Row]:
    """Rows of all steps of all calls; those the deadline cuts off say so."""
    rows: list[Row] = []
    layers = layer.Layers(machine)
    rounds = selection.rounds or (1 if machine.smoke else ROUNDS)
    for case in selection.cases(plan(machine.smoke)):
        if deadline.passed():
            rows += [_row(case, name, "", "skipped", deadline.reason) for name in BACKENDS]
            continue
        rows += layers.measured(case, lambda work: _measured(work, rounds))
    return rows


def _measured(work: Work, rounds: int) -> list[Row]:
    """Rows of one call by every backend, in turn."""
    ready: dict[str, Timer] = {}
    rows: list[Row] = []
    for backend in BACKENDS[1 if work.machine.smoke else 0 :]:
        try:
            ready[backend] = Timer(work, backend)
        except Exception as error:  # noqa: BLE001  whatever a kernel or a compiler does is a row
            status, note = timed_outcome(error, backend, work.machine.device)
            rows.append(_row(work.case, backend, "", status, note))
    for _ in range(rounds):
        for timer in ready.values():
            timer.round()
    for backend, timer in ready.items():
        rows += [_row(work.case, backend, *step) for step in timer.figures()]
    for row in rows:
        print("  ".join(str(row[key]) for key in _PRINTED), flush=True)
    return rows


class Marks:
    """Moments between the steps of queued calls: events on a GPU, else the host's clock."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._calls: list[list[Any]] = []

    def begin(self) -> None:
        """A call begins."""
        self._calls.append([])
        self.mark()

    def mark(self) -> None:
        """A step of it ends."""
        if not self._cuda:
            self._calls[-1].append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._calls[-1].append(event)

    def seconds(self) -> list[list[float]]:
        """Of each call, of each step; waits for the device."""
        if not self._cuda:
            return [[b - a for a, b in pairwise(call)] for call in self._calls]
        torch.cuda.synchronize()
        return [[a.elapsed_time(b) / 1e3 for a, b in pairwise(call)] for call in self._calls]


def _marked(kernels: gpu.LayerKernels, mark: Callable[[], None]) -> gpu.LayerKernels:
    """The same kernels, with a mark after each step but the first product."""

    def then(run: Callable[..., Any]) -> Callable[..., Any]:
        def both(*arguments: Any) -> Any:
            result = run(*arguments)
            mark()
            return result

        return both

    own = kernels.around
    around = StageKernels(then(own.sort), then(own.combine), then(own.reduce), own.written)
    products = gpu.Products(then(kernels.products.outputs), kernels.products.width)
    return replace(kernels, around=around, products=products)


@contextmanager
def _first_product_marked(mark: Callable[[], None]) -> Iterator[None]:
    """The first product, which `Products.outputs` calls, ends with a mark too."""
    inner = experts.triton_inner

    def marked(*arguments: Any) -> torch.Tensor:
        h = inner(*arguments)
        mark()
        return h

    with mock.patch.object(experts, "triton_inner", marked):
        yield


class Timer:
    """One call of the layer by Triton's products and the kernels of a backend around them.

    Raises:
        CheckFailed: its output is further from float64 than allowed, or steps are missing.
        BackendUnavailable: the backend does not serve it.
    """

    def __init__(self, work: Work, backend: str) -> None:
        self.work, self.backend = work, backend
        request = request_of("layer", work.hidden[0], work.case.top_k, work.experts)
        select(request, backend)  # runs its self-check, or says why it does not serve
        around = stage_kernels(backend, backend)
        self._kernels = gpu.LayerKernels(gpu.TRITON, around, launches(request))
        self._stats = LayerStats(work.case.experts, device=work.machine.device)
        self._steps: list[list[float]] = []
        self._whole: list[float] = []
        self._windows: list[Window] = []
        self.error = self._verify()

    def _call(self, kernels: gpu.LayerKernels, hidden: torch.Tensor) -> torch.Tensor:
        work = self.work
        shared = (work.ids, work.router_weights, work.experts)
        # At once: parts of a call would mark their steps again.
        whole = LayerCall(hidden, *shared, self._stats, chunk=work.case.tokens)
        return gpu.observe_layer(kernels, whole)

    def _stepped(self, calls: int) -> list[list[float]]:
        marks = Marks(self.work.machine.device)
        kernels = _marked(self._kernels, marks.mark)
        with _first_product_marked(marks.mark):
            busy(self.work.machine.device)
            for number in range(calls):
                marks.begin()
                self._call(kernels, self.work.hidden[number % len(self.work.hidden)])
        return marks.seconds()

    def _verify(self) -> float:
        """The error of sampled outputs."""
        work = self.work
        out = self._call(self._kernels, work.hidden[0])[work.sample]
        error = relative_error(out, work.truth[0])
        products = products_of("triton", work.hidden[0], work.case.top_k, work.experts)
        bound = bounds_of(work.experts.dtype, products).output
        if not error <= bound:
            raise CheckFailed(f"the output is off by {error:.1e}, {bound:.0e} is allowed")
        found = len(self._stepped(1)[0])
        if found != len(STEPS):
            raise CheckFailed(f"the layer has {found} steps, not {', '.join(STEPS)}")
        return error

    def round(self) -> None:
        """Some calls with events between the steps, and as many without."""
        work, repeats = self.work, 1 if self.work.machine.smoke else REPEATS
        calls = [lambda h=h: self._call(self._kernels, h) for h in work.hidden]
        with work.machine.watch.window(self._windows):
            self._steps += self._stepped(repeats)
            self._whole += behind(calls, work.machine.device, repeats)

    def figures(self) -> list[tuple[str, str, str, Row]]:
        """Step, status, note and figures of each step."""
        columns = [sorted(column) for column in zip(*self._steps, strict=True)]
        middle = [statistics.median(column) for column in columns]
        found = []
        for name, ordered, seconds in zip(STEPS, columns, middle, strict=True):
            edge = int(0.2 * (len(ordered) - 1))
            figures: Row = {
                "calls": len(ordered),
                "ms": f"{seconds * 1e3:.4g}",
                "ms_p20": f"{ordered[edge] * 1e3:.4g}",
                "ms_p80": f"{ordered[-1 - edge] * 1e3:.4g}",
                "share": f"{100 * seconds / sum(middle):.1f}",
                "layer_ms": f"{statistics.median(self._whole) * 1e3:.4g}",
                "sum_ms": f"{sum(middle) * 1e3:.4g}",
            }
            figures |= self._of(name, seconds) | self.work.machine.watch.columns(self._windows)
            found.append((name, "timed", f"output off by {self.error:.1e}", figures))
        return found

    def _of(self, step: str, seconds: float) -> Row:
        """What a step reaches: of the dense product for products, of a copy for the others."""
        case, machine, slots = self.work.case, self.work.machine, self.work.slots
        one = slots * case.hidden * case.intermediate
        flops = {"gate_up": 4 * one, "down": 2 * one}
        if step in flops:
            return {"pct_peak": f"{100 * flops[step] / seconds / machine.peak:.1f}"}
        size = DTYPE.itemsize
        index = slots * (8 + size)
        moved = {
            "sort": index + 16 * slots,
            "combine": (slots + case.tokens) * case.hidden * size + index + 12 * slots,
            "reduce": index + 12 * slots,
        }
        return {"pct_copy": f"{100 * moved[step] / seconds / machine.copy:.1f}"}


def _row(
    case: Case, variant: str, step: str, status: str, note: str, figures: Row | None = None
) -> Row:
    shape: Row = {"shape": case.name, "E": case.experts, "k": case.top_k, "H": case.hidden}
    what: Row = {"I": case.intermediate, "tokens": case.tokens, "routing": case.skew}
    what |= {"dtype": str(DTYPE).removeprefix("torch."), "variant": variant, "step": step}
    own = dict.fromkeys(_FIGURES, "") | (figures or {})
    return {**shape, **what, "status": status, **own, "note": note}
