"""Stage tiles, only where asked for: launches of both products at two numbers of rows per expert.

What `reap-kernels tune` searches in full, here for the tiles that compete on Hopper. Each launch is
compared with float64 before it is timed; kernels are compiled in several processes first.
"""

import os
from collections.abc import Sequence
from multiprocessing import get_context

import torch

from bench.gpu.clock import Deadline
from bench.gpu.machine import Machine
from reap_kernels.tune import Measured, Shape, cuda_timer, measurements, random_experts
from reap_kernels.tuning import Launch

Row = dict[str, object]
# Experts of DeepSeek-V3 and their rows, but fewer: all 256 of them change nothing in a tile.
SHAPES = {"Qwen3-30B-A3B": Shape(128, 8, 2048, 768), "DeepSeek-V3": Shape(32, 8, 7168, 2048)}
ROWS, FEW_ROWS = (1024, 192), (8, 32)
_SMOKE = {"tiny": Shape(4, 2, 64, 32)}

# block_m, block_n, block_k, group_m, warps, stages.
_GATE_UP = (
    (128, 128, 64, 8, 8, 4), (128, 128, 64, 8, 8, 3), (128, 128, 64, 16, 8, 4),
    (128, 128, 64, 4, 8, 4), (64, 128, 64, 8, 4, 4), (64, 128, 64, 8, 8, 4), (128, 64, 64, 8, 4, 4),
    (128, 64, 64, 8, 8, 4), (128, 64, 64, 8, 4, 3), (64, 256, 64, 8, 8, 3),
)  # fmt: skip
_DOWN = (
    (128, 128, 64, 8, 8, 3), (128, 128, 64, 8, 8, 4), (128, 128, 64, 8, 4, 3),
    (128, 128, 64, 8, 4, 4), (128, 256, 64, 8, 8, 3), (128, 256, 64, 8, 8, 4),
    (128, 256, 64, 16, 8, 3), (64, 256, 64, 8, 4, 4), (64, 256, 64, 8, 8, 4),
    (128, 128, 64, 16, 8, 3),
)  # fmt: skip
# The same by the kernel that reads boxes, which competes from sm_90 on.
_GATE_UP_TMA = (
    (128, 128, 64, 8, 8, 3), (128, 128, 64, 8, 8, 4), (128, 128, 64, 16, 8, 3),
    (64, 128, 64, 8, 4, 4), (128, 64, 64, 8, 8, 4),
)  # fmt: skip
_DOWN_TMA = (
    (128, 256, 64, 16, 8, 3), (128, 256, 64, 8, 8, 4), (128, 128, 64, 8, 8, 4),
    (64, 256, 64, 8, 4, 4),
)  # fmt: skip
LAUNCHES = {
    op: [Launch(*sizes) for sizes in own] + [Launch(*sizes, kernel="tma") for sizes in boxed]
    for op, own, boxed in (("gate_up", _GATE_UP, _GATE_UP_TMA), ("down", _DOWN, _DOWN_TMA))
}


def run(machine: Machine, deadline: Deadline, rows_of: Sequence[int] = ROWS) -> list[Row]:
    """Rows of every launch, at `rows_of` rows per expert; those the deadline cuts off say so."""
    shapes, rows_of = (_SMOKE, (8,)) if machine.smoke else (SHAPES, rows_of)
    launches = {op: own[:1] if machine.smoke else own for op, own in LAUNCHES.items()}
    if machine.device.type == "cuda":
        _compile(machine.device, shapes, launches)
    rows: list[Row] = []
    for name, shape in shapes.items():
        experts = random_experts(shape, torch.bfloat16, machine.device)
        for number in rows_of:
            for op, own in launches.items():
                if deadline.passed():
                    rows.append(_row(name, shape, number, op, "", "skipped", deadline.reason))
                    continue
                timer = (lambda call: 0.0) if machine.smoke else cuda_timer
                found = measurements(op, own, shape, experts, number, timer)
                rows += [_timed(name, shape, one) for one in found]
        del experts
    return rows


def _compile(
    device: torch.device, shapes: dict[str, Shape], launches: dict[str, list[Launch]]
) -> None:
    """Fills Triton's cache, many launches at a time, with few experts."""
    jobs = [
        (op, launch, Shape(8, 8, shape.hidden, shape.intermediate), device)
        for op, own in launches.items()
        for launch in own
        for shape in shapes.values()
    ]
    context = get_context("spawn")  # CUDA does not survive a fork
    with context.Pool(max(1, min(10, (os.cpu_count() or 2) // 2))) as pool:
        pool.map(_compiled, jobs, chunksize=2)


def _compiled(job: tuple[str, Launch, Shape, torch.device]) -> None:
    op, launch, shape, device = job
    experts = random_experts(shape, torch.bfloat16, device)
    list(measurements(op, [launch], shape, experts, 128, lambda call: 0.0))


def _timed(name: str, shape: Shape, one: Measured) -> Row:
    if one.milliseconds is None:
        return _row(name, shape, one.rows, one.op, str(one.launch), "wrong", one.reason)
    row = _row(name, shape, one.rows, one.op, str(one.launch), "timed", "")
    depth = 2 if one.op == "gate_up" else 1
    flops = 2 * depth * one.rows * shape.experts * shape.hidden * shape.intermediate
    tflops = flops / one.milliseconds / 1e9 if one.milliseconds else 0.0
    return {**row, "ms": f"{one.milliseconds:.4f}", "tflops": f"{tflops:.4g}"}


def _row(name: str, shape: Shape, rows: int, op: str, launch: str, status: str, note: str) -> Row:
    """A row before its figures; `rows` an expert."""
    sizes: Row = {"E": shape.experts, "k": shape.top_k, "H": shape.hidden, "I": shape.intermediate}
    what: Row = {"rows": rows, "op": op, "launch": launch, "dtype": "bfloat16", "status": status}
    return {"shape": name, **sizes, **what, "ms": "", "tflops": "", "note": note}
