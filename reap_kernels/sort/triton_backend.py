"""When the `triton` backend serves `sort`, and its self-check; Triton is imported at first use."""

from collections.abc import Callable

import torch
from torch import Tensor

from reap_kernels import device, selfcheck
from reap_kernels.dispatch import Backend, Request
from reap_kernels.sort import reference
from reap_kernels.testing import ROUTING_CASES, make_inputs
from reap_kernels.types import Routing

Sort = Callable[[Tensor, Tensor | None, int], Routing]


def priority(request: Request) -> int:
    """Before everything else on a GPU; on the CPU, where it is interpreted, after `cpu`."""
    return 20 if request.device.type == "cuda" else 5


def limits(request: Request) -> str | None:
    """Why Triton cannot serve a request, as far as is known without running anything."""
    reason = device.triton_refusal(request.device)
    if reason is not None:
        return reason
    if request.dtype == torch.float64:
        return "float64 is served by `reference` only"
    if request.sizes.tokens * request.sizes.top_k >= 1 << 31:
        return "tokens * top_k reaches 2^31, where row numbers overflow; pass fewer tokens at once"
    return None


def refusal(request: Request) -> str | None:
    """Why `sort` cannot be served, or None."""
    return limits(request) or selfcheck.verdict(
        "sort", request.device, {}, lambda: check(prepare(request), request.device)
    )


def prepare(request: Request) -> Sort:
    """See `reap_kernels.sort.op.sort_by_expert`."""
    from reap_kernels.sort import gpu

    return gpu.sort_by_expert


def check(run: Sort, where: torch.device) -> str | None:
    """Compares routings, which must be equal to the reference's."""
    for case in ROUTING_CASES:
        inputs = make_inputs(case)
        ids, weights = inputs.topk_ids.to(where), inputs.topk_weights.to(where)
        got = run(ids, weights, case.experts)
        want = reference.sort_by_expert(ids, weights, case.experts)
        if not (
            torch.equal(got.gather_index, want.gather_index)
            and torch.equal(got.offsets, want.offsets)
        ):
            return f"another gather_index than the reference's for case {case.name!r}"
    return None


BACKEND = Backend("sort", "triton", priority, refusal, prepare)
