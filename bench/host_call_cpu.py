"""Host time of one small layer call: whole on the CPU backend, and what the library itself adds.

Calls are so small that arithmetic is a minor part. The backend `nothing`, which exists here only,
allocates its output: left are checks, the choice of a backend and bookkeeping. Every call is timed
on its own, kinds of calls in turn; the minimum is what the code takes, the median what a busy
machine makes of it.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import reap_kernels as rk
from bench import rows
from reap_kernels.dispatch import Backend, always, register, select
from reap_kernels.layer.call import LayerCall
from reap_kernels.testing import Case, make_experts, make_inputs

CASE = Case("host", "eight experts", tokens=8, experts=8, top_k=2, hidden=32, intermediate=16)
MANY = Case("host", "as many matrices", tokens=8, experts=128, top_k=2, hidden=32, intermediate=16)
NOTHING = Backend(
    "layer",
    "nothing",
    lambda request: -1,
    lambda request: None,
    always(lambda call: torch.empty_like(call.hidden)),
)

Call = Callable[[], object]


def _layer(case: Case, layout: str, backend: str, observed: bool) -> Call:
    """One call of `observe_layer` with the same inputs every time."""
    inputs, experts = make_inputs(case), make_experts(case, layout)
    stats = rk.LayerStats(case.experts) if observed else None
    call = (inputs.hidden, inputs.topk_ids, inputs.topk_weights, experts, stats)
    return lambda: rk.observe_layer(*call, backend=backend)


def _choice() -> Call:
    """The choice of a backend alone, for a request that has been seen before."""
    inputs, experts = make_inputs(CASE), make_experts(CASE)
    call = LayerCall(inputs.hidden, inputs.topk_ids, inputs.topk_weights, experts)
    return lambda: select(call.request)


def calls() -> dict[tuple[str, str, str, str], Call]:
    """(call, backend, layout, statistics) -> what is timed; `direct` calls skip the operator."""
    kinds: dict[tuple[str, str, str, str], Call] = {}
    for entry in ("direct", "operator"):
        for backend in ("cpu", "nothing"):
            for observed in (True, False):
                stats = "yes" if observed else "no"
                kinds[entry, backend, "stacked", stats] = _layer(CASE, "stacked", backend, observed)
            table = _layer(MANY, "per-expert", backend, True)
            kinds[entry, backend, "128 tables", "yes"] = table
    kinds["select", "", "stacked", ""] = _choice()
    kinds["check_backend", "", "stacked", ""] = lambda: rk.check_backend(
        "layer", "cpu", torch.float32
    )
    return kinds


def _microseconds(call: Call, direct: bool, number: int) -> list[float]:
    """Of each of `number` calls, after a few that are not counted."""
    taken = []
    with torch.set_grad_enabled(not direct):  # a call that nothing differentiates is direct
        for _ in range(10):
            call()
        for _ in range(number):
            start = time.perf_counter_ns()
            call()
            taken.append((time.perf_counter_ns() - start) / 1e3)
    return taken


def measure(rounds: int, number: int) -> list[dict[str, object]]:
    """Rows of all kinds of calls.

    Args:
        rounds: how often all kinds take their turn.
        number: of calls of one kind in one round.
    """
    kinds = calls()
    taken: dict[tuple[str, str, str, str], list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, call in kinds.items():
            taken[kind] += _microseconds(call, kind[0] != "operator", number)
    names = ("call", "backend", "layout", "statistics")
    return [
        {
            **dict(zip(names, kind, strict=True)),
            "calls": len(times),
            "min_us": f"{min(times):.1f}",
            "median_us": f"{statistics.median(times):.1f}",
        }
        for kind, times in taken.items()
    ]


def main(arguments: list[str]) -> None:
    """Times every kind of call on one thread and appends the rows."""
    parser = argparse.ArgumentParser(prog="python -m bench host_call_cpu", description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--calls", type=int, default=300, help="calls of a kind in one round")
    parser.add_argument("--dry-run", action="store_true", help="print rows, do not append them")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    register(NOTHING)
    found = measure(options.rounds, options.calls)
    if options.dry_run:
        print(*found, sep="\n", flush=True)
    else:
        rows.write("host_call_cpu", found)
