"""Stage `choices`: with which backend of its sort, and of its saliency, a whole layer is faster.

The layer runs with each of CUDA's and Triton's kernels of either stage, around the same products,
interleaved as `bench.gpu.paired` says; one variant is there twice and states the noise. What the
rows support is proposed as lines of a launch table.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from bench.gpu import layer
from bench.gpu.clock import Deadline
from bench.gpu.layer import DTYPE, Row
from bench.gpu.machine import Machine
from bench.gpu.paired import CONFIDENCE, Effect, Times, effect, interleaved
from bench.gpu.providers import Work, checked, of_run
from bench.gpu.verify import bounds_of, outcome_of
from reap_kernels import device, tuning
from reap_kernels.dispatch import select
from reap_kernels.experts.request import request_of
from reap_kernels.experts.triton_backend import launches
from reap_kernels.layer import cuda_backend, gpu
from reap_kernels.layer.call import LayerCall
from reap_kernels.saliency.stage_kernels import stage_kernels
from reap_kernels.testing import Case
from reap_kernels.tuning import STAGE_BACKENDS, Entry, Table

OPS, BACKENDS = ("sort", "saliency"), ("cuda", "triton")
# The op of rows that compare a variant with itself.
SAME = "same"
ROUNDS, FEWEST = 200, 30
_SHAPES = ("Qwen3-30B-A3B", "DeepSeek-V3", "Qwen3.5-397B")
_TOKENS = (16384, 2048, 65536)
# Upper bounds of buckets of a launch table.
_WIDTHS: tuple[int | None, ...] = (1024, None)
_ROWS: tuple[int | None, ...] = (64, 255, None)
_FIGURES = ("rounds", "ms_cuda", "ms_triton", "cuda/triton", "low", "high", "noise", "host")
_FIGURES = (*_FIGURES, "verdict")
Run = Callable[[LayerCall], Tensor]


def plan(smoke: bool) -> list[Case]:
    """Every layer call: each shape's lengths, balanced and Zipf's, before the next shape's."""
    if smoke:
        return layer.plan(smoke)
    shapes = [next(shape for shape in layer.SHAPES if shape.name == name) for name in _SHAPES]
    return [
        replace(shape, tokens=tokens, skew=skew)
        for shape in shapes
        for tokens in _TOKENS
        for skew in ("balanced", "zipf")
    ]


def run(machine: Machine, deadline: Deadline) -> list[Row]:
    """Rows of all calls; those that the deadline cuts off say so."""
    rows: list[Row] = []
    layers = layer.Layers(machine)
    cases = plan(machine.smoke)
    for at, case in enumerate(cases):
        if deadline.passed():
            rows += [_row(machine, case, op, "skipped", deadline.reason) for op in (*OPS, SAME)]
            continue
        share = Deadline(deadline.left() / (len(cases) - at))
        rows += layers.measured(case, lambda work, share=share: _compared(work, share))
    return rows


def _compared(work: Work, deadline: Deadline) -> list[Row]:
    """Rows of one call."""
    machine, case = work.machine, work.case
    try:
        calls, note = _variants(work)
        times = interleaved(calls, machine.device, 1 if machine.smoke else ROUNDS, deadline)
    except Exception as error:  # noqa: BLE001  whatever a kernel or a compiler does is a row
        status, note = outcome_of(error, "cuda", machine.device)
        return [_row(machine, case, op, status, note) for op in (*OPS, SAME)]
    if times.rounds < FEWEST and not machine.smoke:
        note = f"{times.rounds} rounds, of {FEWEST} that tell; {deadline.reason}"
        return [_row(machine, case, op, "skipped", note) for op in (*OPS, SAME)]
    noise = effect(_control(times.device)).spread
    figures = {op: _figures(times, op, noise) for op in (*OPS, SAME)}
    return [_row(machine, case, op, "timed", note, own) for op, own in figures.items()]


def _name(sort: str, saliency: str) -> str:
    return f"{sort} {saliency}"


def _variants(work: Work) -> tuple[dict[str, Sequence[Callable[[], object]]], str]:
    """Calls of every variant, each checked against float64, and the products they share.

    Raises:
        CheckFailed: a variant's result is wrong.
        BackendUnavailable: CUDA's kernels do not serve this call, or Triton's do not.
    """
    request = request_of("layer", work.hidden[0], work.case.top_k, work.experts)
    for backend in BACKENDS:
        select(request, backend)  # runs its self-check, or says why it does not serve
    products = cuda_backend.stage_backends(request)["layer"]

    def variant(sort: str, saliency: str) -> Sequence[Callable[[], object]]:
        around = stage_kernels(sort, saliency)
        own = gpu.prepared(gpu.PRODUCTS[products], around, launches(request), request)
        prepared = of_run(work, own, bounds_of(DTYPE, products).output)
        checked(work, prepared)
        return prepared.calls

    calls = {_name(a, b): variant(a, b) for a in BACKENDS for b in BACKENDS}
    calls[SAME] = calls[_name(BACKENDS[0], BACKENDS[0])]
    return calls, f"products by {products}"


def _pairs(op: str) -> list[tuple[str, str]]:
    """Variants that differ in one op only: CUDA's and Triton's."""
    if op == SAME:
        return [(SAME, _name(BACKENDS[0], BACKENDS[0]))]
    if op == "sort":
        return [(_name("cuda", other), _name("triton", other)) for other in BACKENDS]
    return [(_name(other, "cuda"), _name(other, "triton")) for other in BACKENDS]


def _ratios(seconds: dict[str, list[float]], op: str) -> list[float]:
    """For each round, the logarithm of CUDA's time over Triton's, the mean of all pairs."""
    pairs = [zip(seconds[a], seconds[b], strict=True) for a, b in _pairs(op)]
    each = [[math.log(first / second) for first, second in pair] for pair in pairs]
    return [statistics.fmean(round_) for round_ in zip(*each, strict=True)]


def _control(seconds: dict[str, list[float]]) -> list[float]:
    return _ratios(seconds, SAME)


def _figures(times: Times, op: str, noise: float) -> Row:
    """What the rounds say of one op; of `same`, of the same kernels twice."""
    first, second = zip(*_pairs(op), strict=True)

    def middle(names: tuple[str, ...]) -> str:
        return f"{1e3 * statistics.median(t for name in names for t in times.device[name]):.4g}"

    found: Effect = effect(_ratios(times.device, op))
    return {
        "rounds": times.rounds,
        "ms_cuda": middle(first),
        "ms_triton": middle(second),
        "cuda/triton": f"{found.ratio:.5f}",
        "low": f"{found.low:.5f}",
        "high": f"{found.high:.5f}",
        "noise": f"{math.expm1(noise):.5f}",
        "host": f"{effect(_ratios(times.host, op)).ratio:.4f}",
        "verdict": "" if op == SAME else found.verdict(*BACKENDS, noise),
    }


def _row(
    machine: Machine, case: Case, op: str, status: str, note: str, figures: Row | None = None
) -> Row:
    shape: Row = {"shape": case.name, "E": case.experts, "k": case.top_k, "H": case.hidden}
    what: Row = {"I": case.intermediate, "tokens": case.tokens, "routing": case.skew}
    what |= {
        "dtype": str(DTYPE).removeprefix("torch."),
        "arch": device.architecture(machine.device),
    }
    own = dict.fromkeys(_FIGURES, "") | (figures or {})
    return {**shape, **what, "op": op, "status": status, **own, "note": note}


def proposed(rows: Sequence[dict[str, Any]]) -> tuple[Entry, ...]:
    """The lines of a launch table that rows support: a bucket's backend is the one all decided
    rows of it name; where none is decided, or they disagree, the first of `STAGE_BACKENDS`. An op
    whose every bucket is that one needs no line.
    """
    found: list[Entry] = []
    for op in OPS:
        lines = [
            Entry(op, "half", width, most, backend=_agreed(rows, op, width, most))
            for most in _ROWS
            for width in _WIDTHS
        ]
        if {line.backend for line in lines} != {STAGE_BACKENDS[op][0]}:
            found += lines
    return tuple(found)


def _agreed(rows: Sequence[dict[str, Any]], op: str, width: int | None, most: int | None) -> str:
    """The backend of one bucket: rows belong to the first bucket that covers them."""
    verdicts = {
        row["verdict"]
        for row in rows
        if (row["op"], row["status"]) == (op, "timed")
        and _bucket(int(row["I"]), _WIDTHS) == width
        and _bucket(int(row["tokens"]) * int(row["k"]) / int(row["E"]), _ROWS) == most
    } & set(BACKENDS)
    return verdicts.pop() if len(verdicts) == 1 else STAGE_BACKENDS[op][0]


def _bucket(value: float, bounds: tuple[int | None, ...]) -> int | None:
    return next(bound for bound in bounds if bound is None or value <= bound)


def propose(folder: Path, facts: dict[str, str], rows: Sequence[dict[str, Any]]) -> Path | None:
    """Writes the supported lines as a file that `REAP_TUNING` can name, and whose lines a file of
    `configs/` can take; None where no line is supported.
    """
    lines = proposed(rows)
    if not lines:
        print("choices: no line of a launch table is supported; the defaults hold", flush=True)
        return None
    arch = str(rows[0]["arch"])
    origin = (
        f"whole layers interleaved on {facts['gpu']}, Triton {facts['triton']}, commit "
        f"{facts['commit']}, intervals of {CONFIDENCE:.0%} (python -m bench.gpu --only choices)"
    )
    path = folder / f"{arch}-choices.json"
    Table(arch, origin, tuning.ordered(lines)).save(path)
    print(f"choices: proposed lines are in {path}", flush=True)
    return path
