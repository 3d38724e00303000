"""Stage `gram`, one layer: the observed call that also sums Gram matrices, beside the one that does
not.

Both take the same inputs in turn. A Gram matrix costs I / (3 H) of an expert's products, half of
that where only its lower triangle is computed.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

import reap_kernels as rk
from bench.gpu import layer
from bench.gpu.clock import Deadline
from bench.gpu.layer import Row
from bench.gpu.machine import Machine
from bench.gpu.providers import Prepared, Provider, Work, ours
from bench.gpu.selection import PLANNED, Selection
from bench.gpu.verify import CheckFailed
from reap_kernels import LayerGram, LayerStats
from reap_kernels.gram.triton_backend import difference
from reap_kernels.testing import Case

WITH = "reap with Gram matrices"
BACKENDS = ("triton", "grouped_mm", "cuda")
RATIO = "with/without"
# Of Qwen3-30B-A3B's shape, by the fastest backend.
GOAL = 1.10
_SHAPES = ("Qwen3-30B-A3B", "GLM-4.5-Air", "DeepSeek-V3")
_TOKENS = 16384
# bf16 h is rounded, and once more what the sums are made of.
_BOUND = 1e-2


def plan(smoke: bool) -> list[Case]:
    """Every layer call: all shapes of balanced routing, then the first by Zipf's law."""
    if smoke:
        return layer.plan(smoke)
    shapes = [replace(s, tokens=_TOKENS) for s in layer.SHAPES if s.name in _SHAPES]
    shapes.sort(key=lambda shape: _SHAPES.index(shape.name))
    balanced = [replace(shape, skew="balanced") for shape in shapes]
    return [*balanced, replace(shapes[0], skew="zipf")]


def _summing(backend: str) -> Callable[[Work], Prepared]:
    """The observed call of a backend, with Gram matrices."""
    plain = ours(backend, observed=True)

    def prepare(work: Work) -> Prepared:
        case, device = work.case, work.machine.device
        known = plain(work)
        stats = LayerStats(case.experts, device=device)
        sums = LayerGram(case.experts, case.intermediate, device)
        shared = (work.ids, work.router_weights, work.experts)

        def call(hidden: torch.Tensor) -> Callable[[], torch.Tensor]:
            return lambda: rk.observe_layer(hidden, *shared, stats, gram=sums, backend=backend)

        def verify() -> tuple[torch.Tensor, torch.Tensor]:
            """The whole call, of which only the sampled tokens count."""
            mask = torch.zeros(case.tokens, dtype=torch.bool, device=device)
            mask[work.sample] = True
            at = work.sample
            got, want = (LayerGram(case.experts, case.intermediate, device) for _ in range(2))
            own, less = (LayerStats(case.experts, device=device) for _ in range(2))
            every = (work.hidden[0], *shared)
            out = rk.observe_layer(*every, own, mask=mask, gram=got, backend=backend)
            without = rk.observe_layer(*every, less, mask=mask, backend=backend)
            if not (
                torch.equal(out, without) and all(map(torch.equal, own.packed(), less.packed()))
            ):
                raise CheckFailed("Gram matrices change the output, or the statistics")
            some = (work.hidden[0][at], work.ids[at], work.router_weights[at], work.experts)
            rk.observe_layer(*some, gram=want, backend="reference")
            problem = difference(got, want, _BOUND)
            if problem:
                raise CheckFailed(problem)
            return out[at], torch.stack([own.count.double(), own.norm_sum, own.weighted_norm_sum])[
                :, 0
            ]

        calls = [call(hidden) for hidden in work.hidden]
        size = LayerGram.nbytes_of(case.experts, case.intermediate) / 1e6
        note = f"{known.note}; sums of {size:.0f} MB"
        return Prepared(calls, verify, output=known.output, note=note)

    return prepare


def providers(backends: Sequence[str] = BACKENDS) -> list[Provider]:
    """The observed call of each backend, without and with Gram matrices."""
    return [
        provider
        for backend in backends
        for provider in (
            Provider("reap", backend, True, ours(backend, observed=True)),
            Provider(WITH, backend, True, _summing(backend)),
        )
    ]


def run(
    machine: Machine,
    deadline: Deadline,
    selection: Selection = PLANNED,
    backends: Sequence[str] = BACKENDS,
) -> list[Row]:
    """Rows of all calls, each with its time over that of the same backend without."""
    cases = selection.cases(plan(machine.smoke))
    rounds = selection.rounds or (1 if machine.smoke else layer.ROUNDS)
    rows = layer.run(machine, cases, deadline, providers(backends), rounds)
    plain = {_call(row): row for row in rows if row["provider"] == "reap"}
    for row in rows:
        less = plain[_call(row)]
        both = row["status"] == less["status"] == "timed" and row["provider"] == WITH
        row[RATIO] = f"{float(str(row['ms'])) / float(str(less['ms'])):.3f}" if both else ""
    return rows


def _call(row: Row) -> tuple[object, ...]:
    """What rows with and without Gram matrices share."""
    return tuple(row[key] for key in ("shape", "tokens", "routing", "variant"))
