"""Runs the checks of a GPU, in processes, and says in a row what each came to.

Nearly all of their time is the compilation of kernels, so that several processes share it.
"""

import multiprocessing
import os
import time
from concurrent.futures import Future, ProcessPoolExecutor

import torch

from bench.gpu.clock import Deadline
from bench.gpu.verify import outcome_of
from tests.gpu import (
    attention,
    facts,
    fp8,
    fusing,
    grams,
    jobs,
    logits,
    masks,
    models,
    norms,
    products,
    tma,
)
from tests.gpu import checks as layers
from tests.gpu.checks import Check

# Seconds that checks which began before the deadline may still take.
_GRACE = 45


def plan(smoke: bool) -> list[Check]:
    """Every check there is: the GPU's own facts first, whole models and jobs last."""
    every = (
        facts,
        logits,
        norms,
        masks,
        products,
        tma,
        fp8,
        grams,
        layers,
        models,
        attention,
        fusing,
        jobs,
    )
    return [check for module in every for check in module.plan(smoke)]


def outcome(check: Check, device: torch.device, deadline: Deadline) -> dict[str, object]:
    """The row of one check: pass, failed, refused (a limit of the backend's) or skipped."""
    start = time.perf_counter()
    if deadline.passed():
        result, detail = "skipped", deadline.reason
    else:
        try:
            result, detail = "pass", check.run(device, check.backend, check.dtype, *check.arguments)
        except Exception as error:  # noqa: BLE001  whatever a kernel or a compiler does is red
            result, detail = outcome_of(error, check.backend, device)
    return _row(check, result, detail, time.perf_counter() - start)


def _row(check: Check, result: str, detail: str, seconds: float) -> dict[str, object]:
    return {
        "check": check.name,
        "backend": check.backend,
        "dtype": str(check.dtype).removeprefix("torch."),
        "result": result,
        "detail": detail,
        "seconds": f"{seconds:.2f}",
    }


def run(
    device: torch.device, checks: list[Check], deadline: Deadline, workers: int | None = None
) -> list[dict[str, object]]:
    """Rows of all checks, in order.

    Args:
        device: where.
        checks: what to run.
        deadline: checks that have not begun by then are skipped.
        workers: processes; default none on the CPU, else three for four cores, at most 12.
    """
    if workers is None:
        several = max(1, min(12, 3 * (os.cpu_count() or 2) // 4))
        workers = 0 if device.type == "cpu" else several
    if not workers:
        return [outcome(check, device, deadline) for check in checks]
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    pool = ProcessPoolExecutor(workers, mp_context=context)
    try:
        futures = [pool.submit(outcome, check, device, deadline) for check in checks]
        pairs = zip(checks, futures, strict=True)
        return [_result(check, future, deadline) for check, future in pairs]
    finally:
        # A kernel that hangs must not hang the run: what is at work now is at work too long.
        children = multiprocessing.active_children()
        pool.shutdown(wait=False, cancel_futures=True)
        for child in children:
            child.kill()


def _result(check: Check, future: Future[dict[str, object]], end: Deadline) -> dict[str, object]:
    """The row of a check that ran in another process, which may have died or hung."""
    try:
        return future.result(timeout=max(0.0, end.left()) + _GRACE)
    except TimeoutError:
        return _row(check, "failed", f"it had no result {_GRACE} s after the deadline", 0.0)
    except Exception as error:  # noqa: BLE001  a dead process raises several kinds
        return _row(check, "failed", f"its process died: {type(error).__name__}: {error}", 0.0)
