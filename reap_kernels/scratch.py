"""Scratch of GPU backends: where it does not fit a budget, a call is computed in equal parts; and
what Triton's kernels ask for when they are launched.
"""

import contextvars
from collections.abc import Callable

import torch
from torch import Tensor

from reap_kernels import env

# Scratch below this is not worth asking how much memory is free.
_SMALL = 64 << 20
# Bytes that every allocation of torch's on a GPU is aligned to.
_ALIGNMENT = 512
# Calls of one shape are split alike for as long as the process lives: same bits, and no question
# to the driver within a captured graph.
_SPLITS: dict[tuple[torch.device, int, int, int], int] = {}


def fitting(count: int, each: int, where: torch.device, quarters: int = 4) -> int:
    """Items (tokens, experts) computed at a time, at least one: all where their scratch fits.

    The budget is `REAP_SCRATCH_BYTES`, by default a quarter of the memory that is free when a call
    of this size is first made: free to the driver, or held by torch's allocator unused.

    Args:
        count: items there are.
        each: bytes of scratch an item needs.
        where: the device.
        quarters: of the budget that these items may take.
    """
    budget = env.scratch_bytes()
    if budget is not None:
        return _part(count, each, budget * quarters // 4)
    if count * each <= _SMALL or where.type != "cuda":
        return max(count, 1)
    key = (where, count, each, quarters)
    if key not in _SPLITS:
        free, _ = torch.cuda.mem_get_info(where)
        free += torch.cuda.memory_reserved(where) - torch.cuda.memory_allocated(where)
        _SPLITS[key] = _part(count, each, free // 4 * quarters // 4)
    return _SPLITS[key]


def _part(count: int, each: int, budget: int) -> int:
    """Items of one of the fewest equal parts that each fit `budget`."""
    most = max(1, budget // each)
    parts = max(1, -(-count // most))
    return max(1, -(-count // parts))


def launch_with_scratch(launch: Callable[..., object], *args: object, **options: object) -> None:
    """Launches a Triton kernel that makes descriptors on the device.

    They lie in memory of torch's allocator: that of the current stream, and of a CUDA graph's pool
    while one is captured.
    Triton takes an allocator from the context; this one is set in a copy, and the caller's stays.
    """
    import triton

    context = contextvars.copy_context()
    context.run(triton.set_allocator, _allocate)
    context.run(launch, *args, **options)


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory of a launch on the current stream; torch aligns more strictly than is asked."""
    assert alignment <= _ALIGNMENT, alignment
    return torch.empty(size, dtype=torch.int8, device="cuda")
