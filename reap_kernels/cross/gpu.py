"""GPU cross moments: sort, the first grouped product, weighed rows, outer products with targets.

Scratch: h [S, I], whose place its weighted rows take. Where that is more than the budget, the call
is computed in parts of equal tokens: sums move by float32's rounding of one more addition.
"""

from dataclasses import dataclass

from torch import Tensor

from reap_kernels.experts.gpu import triton_inner
from reap_kernels.gram.gpu import add_outer, weigh
from reap_kernels.scratch import fitting
from reap_kernels.sort.gpu import sort_slots
from reap_kernels.tuning import FP8, Launch
from reap_kernels.types import ExpertWeights

# O(S) arrays: both indices, factors, counts and tile lists.
_SLOT_BYTES = 64


@dataclass(frozen=True)
class CrossKernels:
    """Tiles of the first product, and of the outer products."""

    up: Launch
    outer: Launch


def cross(
    kernels: CrossKernels,
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    experts: ExpertWeights,
    targets: Tensor,
    out: Tensor,
) -> None:
    """See `reap_kernels.cross.op.cross`; masked tokens have weights of 0."""
    tokens, top_k = topk_ids.shape
    targets = targets.to(hidden.dtype).contiguous()
    width = experts.intermediate_size * (3 if experts.activation.kind == "opaque" else 1)
    each = top_k * (width * hidden.element_size() + _SLOT_BYTES)
    chunked = experts.layout == "quantized" and kernels.up.kernel != FP8
    size = fitting(tokens, each, hidden.device, 3 if chunked else 4)
    for start in range(0, tokens, size):
        part = slice(start, start + size)
        weights = topk_weights[part].contiguous()
        rows = sort_slots(topk_ids[part], weights, experts.num_experts)
        h = triton_inner(hidden[part], rows, experts, kernels.up)
        weighted = weigh(h, rows, weights.double(), kernels.up.block_m, overwrite=True)
        add_outer(kernels.outer, targets[part], weighted, rows, out, gather=True)
