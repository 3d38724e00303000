"""GPU MoE layer: sort by expert, two grouped products, one pass that combines and measures, one
reduction; each by the kernels of its own backend.

Scratch beside input and output: h [S, I] and y [S, H] (grouped_mm: gathered rows and both halves
too), O(S), and for quantized experts one product's bf16 matrices of as many as fit. Where that is
more than the budget the call is computed in parts of equal tokens, which launch as the whole would:
outputs keep their bits, sums move by at most 1e-12 relative.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from reap_kernels.dispatch import Request
from reap_kernels.experts.gpu import Seen, grouped_outputs, triton_outputs
from reap_kernels.gram.gpu import add_gram, outer_launch
from reap_kernels.layer.call import SLOT_BYTES, LayerCall
from reap_kernels.saliency.measures import SlotMeasures, StageKernels
from reap_kernels.sort.slots import SortedSlots
from reap_kernels.tuning import FP8, Launch, Launches
from reap_kernels.types import ExpertWeights


@dataclass(frozen=True)
class Products:
    """One way to compute a layer's expert outputs.

    Attributes:
        outputs: (hidden, rows, experts, launches, what is given h or None) -> [S, H] by sorted row.
        width: elements of scratch per slot, all held at once.
    """

    outputs: Callable[[Tensor, SortedSlots, ExpertWeights, Launches, Seen | None], Tensor]
    width: Callable[[ExpertWeights], int]


def _triton_width(experts: ExpertWeights) -> int:
    own = 2 * experts.intermediate_size if experts.activation.kind == "opaque" else 0
    return experts.hidden_size + experts.intermediate_size + own


TRITON = Products(triton_outputs, _triton_width)
GROUPED_MM = Products(
    grouped_outputs, lambda experts: 2 * experts.hidden_size + 3 * experts.intermediate_size
)
PRODUCTS = {"triton": TRITON, "grouped_mm": GROUPED_MM}


def _gram_bytes(width: int) -> int:
    """Scratch per slot of the Gram matrices: factors, and float64 sums of every tile of rows; the
    weighted rows take the place of h.
    """
    return 8 + 8 * width // 16  # tiles have 16 rows at least


@dataclass(frozen=True)
class LayerKernels:
    """What computes a layer, as the whole call's request decides it.

    Attributes:
        products: the expert outputs.
        around: what is done around them.
        launches: tiles of the products; parts of a call launch as the whole would.
        gram: tiles of the Gram matrices, where they are asked for.
    """

    products: Products
    around: StageKernels
    launches: Launches
    gram: Launch | None = None


def prepared(
    products: Products, around: StageKernels, launches: Launches, request: Request
) -> Callable[[LayerCall], Tensor]:
    """`observe_layer` with the kernels of a request."""
    gram = outer_launch(request, request.sizes.intermediate) if request.gram else None
    return partial(observe_layer, LayerKernels(products, around, launches, gram))


def observe_layer(kernels: LayerKernels, call: LayerCall) -> Tensor:
    """See `reap_kernels.layer.op.observe_layer`."""
    hidden, experts = call.hidden, call.experts
    slot_bytes = kernels.products.width(experts) * hidden.element_size() + SLOT_BYTES
    if call.gram is not None:
        slot_bytes += _gram_bytes(experts.intermediate_size)
    # The last quarter of the budget is for experts that are dequantized by chunks.
    chunked = experts.layout == "quantized" and kernels.launches.up.kernel != FP8
    quarters = 3 if chunked else 4
    dtype = kernels.around.written(hidden.dtype)
    out = torch.empty(hidden.shape, dtype=dtype, device=hidden.device)
    for tokens, part in call.parts(slot_bytes, quarters):
        _observe_part(kernels, part, out[tokens])
    return out.to(hidden.dtype)


def _observe_part(kernels: LayerKernels, call: LayerCall, out: Tensor) -> None:
    """Computes a call at once, into `out` [T, H]."""
    around, launches, stats = kernels.around, kernels.launches, call.stats
    router_weights = call.topk_weights.contiguous()
    rows = around.sort(call.topk_ids, router_weights, call.experts.num_experts)
    seen = _summing(kernels, call, rows)
    y = kernels.products.outputs(call.hidden, rows, call.experts, launches, seen)
    measures = (
        None if stats is None else SlotMeasures.empty(router_weights.numel(), call.hidden.device)
    )
    around.combine(y, router_weights, rows, out, measures)
    if stats is not None and measures is not None:
        tile = launches.down.block_m
        around.reduce(measures, router_weights, rows, stats, call.mask, call.group, tile)


def _summing(kernels: LayerKernels, call: LayerCall, rows: SortedSlots) -> Seen | None:
    """What adds h to the Gram matrices of a call, or None where it has none."""
    sums, launch = call.gram, kernels.gram
    if sums is None or launch is None:
        return None
    factors, tile = call.gram_factors(), kernels.launches.down.block_m
    return lambda h: add_gram(launch, h, rows, factors, sums, tile, overwrite=True)
