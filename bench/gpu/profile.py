"""Stage `profile`: what one batch of the whole model spends its time on, kernel by kernel.

`torch.profiler` over one batch of `end2end`'s model, observed, and without statistics, each after
the same batch has run. Times are of kernels alone; `gaps` is what the batch takes beside them.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

from bench.gpu import end_to_end
from bench.gpu.clock import Deadline
from bench.gpu.layer import release
from bench.gpu.machine import Machine
from bench.gpu.selection import PLANNED, Selection
from bench.gpu.verify import stage_outcome

Row = dict[str, object]
_LARGEST = 40


def run(machine: Machine, deadline: Deadline, selection: Selection = PLANNED) -> list[Row]:
    """Rows of the kernels that take most, of the others together, and of gaps."""
    reason = end_to_end.missing() or (deadline.reason if deadline.passed() else None)
    if reason is not None:
        return [_row("", "", "skipped", reason)]
    bench = None
    try:
        bench = end_to_end.Bench(machine, selection.sequences)
        first = bench.batches[:1]
        passes: dict[str, Callable[[Any], object]] = {
            "yes": bench.observed,
            "no": bench.unobserved,
        }
        rows = []
        for observed, work in passes.items():
            work(first)
            rows += _profiled(machine, observed, lambda w=work: w(first), bench.note)
        return rows
    except Exception as error:  # noqa: BLE001  what earlier stages found must not be lost
        return [_row("", "", *stage_outcome(error))]
    finally:
        del bench
        release(machine)  # other processes check what comes next


def _profiled(machine: Machine, observed: str, call: Callable[[], object], note: str) -> list[Row]:
    """Rows of one batch."""
    from torch.profiler import ProfilerActivity, profile

    cuda = machine.device.type == "cuda"
    own = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    _wait(machine)
    start = time.perf_counter()
    with profile(activities=own) as found:
        call()
        _wait(machine)
        whole = time.perf_counter() - start
    taken = [
        (event.self_device_time_total if cuda else event.self_cpu_time_total, event)
        for event in found.key_averages()
    ]
    taken = sorted((one for one in taken if one[0] > 0), key=lambda one: -one[0])
    lines = [(event.key, event.count, micro / 1e6) for micro, event in taken[:_LARGEST]]
    others = taken[_LARGEST:]
    lines.append(("others", sum(e.count for _, e in others), sum(m for m, _ in others) / 1e6))
    lines.append(("gaps", "", max(0.0, whole - sum(seconds for *_, seconds in lines))))
    return [
        {
            **_row(observed, " ".join(name.split())[:160], "timed", note),
            "calls": calls,
            "ms": f"{seconds * 1e3:.3f}",
            "share": f"{100 * seconds / whole:.2f}",
            "batch_ms": f"{whole * 1e3:.1f}",
        }
        for name, calls, seconds in lines
    ]


def _wait(machine: Machine) -> None:
    if machine.device.type == "cuda":
        torch.cuda.synchronize(machine.device)


def _row(observed: str, name: str, status: str, note: str) -> Row:
    what: Row = {"model": "Qwen3-30B-A3B's shape", "observed": observed, "kernel": name}
    blank = dict.fromkeys(("calls", "ms", "share", "batch_ms"), "")
    return {**what, "status": status, **blank, "note": note}
