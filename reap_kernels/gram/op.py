"""gram: Gram matrices of the experts' inner activations, for hosts that hold these themselves."""

import torch
from torch import Tensor

from reap_kernels.device import without_autocast
from reap_kernels.dispatch import Backend, Request, Sizes, always, register, select
from reap_kernels.errors import DtypeError, ShapeError
from reap_kernels.gram import cpu, reference, triton_backend
from reap_kernels.gram.factors import checked_scale, row_factors
from reap_kernels.layer_gram import LayerGram
from reap_kernels.saliency.op import checked_mask
from reap_kernels.sort.op import cpu_only
from reap_kernels.types import FLOATS, Routing


def gram(
    h: Tensor,
    routing: Routing,
    router_weights: Tensor,
    sums: LayerGram,
    *,
    mask: Tensor | None = None,
    scale: float | Tensor = 1.0,
    backend: str | None = None,
) -> None:
    """Adds sum s g^2 h h^T of each expert's rows to `sums`, in place, with the other fields.

    For hosts that compute h themselves; `observe_layer(gram=...)` adds it from the h it computes
    anyway. Costs S I^2 multiplications, half as many where only the lower triangle is computed:
    I / (3 H) of a gated expert's products, or half of that.

    Args:
        h: [S, I] float, what the down projections read, by sorted row. Rows that do not count, and
            those no expert here serves, may hold anything.
        routing: of the batch, from `sort_by_expert`; S = T * k rows.
        router_weights: [T, k] float, g. Slots of weight exactly 0 do not count.
        sums: of E experts of I neurons, on the device of `h`.
        mask: [T] bool, tokens that count; default all.
        scale: s, a factor of 0 or more for all tokens, or [T] for each. Tokens of factor 0 do not
            count.
        backend: explicit backend, never falls back. Default: see `explain()`.

    Raises:
        ShapeError, DtypeError, UsageError: inputs that do not fit each other; the message names the
            input.
        BackendUnavailable: no backend serves, or the requested one refuses, with the reason.

    Example:
        >>> import torch
        >>> import reap_kernels as rk
        >>> routing = rk.sort_by_expert(torch.tensor([[0], [1], [0]]), 2)
        >>> h = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])  # of tokens 0, 2 and 1
        >>> sums = rk.LayerGram(num_experts=2, intermediate_size=2)
        >>> rk.gram(h, routing, torch.tensor([[1.0], [1.0], [2.0]]), sums)
        >>> sums.second(0)
        tensor([[37.,  2.],
                [ 2.,  4.]], dtype=torch.float64)
        >>> sums.count
        tensor([2, 1])
    """
    tokens, top_k = _checked_rows(h, routing, router_weights)
    check_sums(sums, len(routing.offsets) - 1, h.shape[1], h.device)
    mask = checked_mask(mask, tokens)
    scale = checked_scale(scale, tokens)
    sizes = Sizes(tokens, top_k, sums.num_experts, intermediate=h.shape[1])
    request = Request("gram", h.device, h.dtype, sizes=sizes)
    with torch.no_grad(), without_autocast(h.device):
        factors = row_factors(router_weights, mask, scale)
        select(request, backend).run(h, routing, factors, sums)


def _checked_rows(h: Tensor, routing: Routing, router_weights: Tensor) -> tuple[int, int]:
    """T and k, where the rows are those of the routing."""
    slots, top_k = len(routing.gather_index), routing.top_k
    if h.ndim != 2 or len(h) != slots:
        raise ShapeError(
            f"h has shape {tuple(h.shape)}; the routing has {slots} rows: expected ({slots}, I)"
        )
    if h.dtype not in FLOATS or not router_weights.dtype.is_floating_point:
        raise DtypeError(
            f"h is {h.dtype} and router_weights {router_weights.dtype}; h must be bf16, fp16, fp32 "
            "or fp64, the weights a float dtype"
        )
    if tuple(router_weights.shape) != (slots // top_k, top_k):
        raise ShapeError(
            f"router_weights has shape {tuple(router_weights.shape)}; expected "
            f"({slots // top_k}, {top_k}), as the routing has it"
        )
    return slots // top_k, top_k


def check_sums(sums: LayerGram, experts: int, width: int, where: torch.device) -> None:
    """Raises unless the sums are of these experts, on this device."""
    if tuple(sums.first.shape) != (experts, width) or sums.device != where:
        raise ShapeError(
            f"the sums hold {sums.num_experts} experts of {sums.intermediate_size} neurons on "
            f"{sums.device}; the layer has {experts} of {width} on {where}"
        )


register(Backend("gram", "reference", lambda _: 0, lambda _: None, always(reference.gram)))
register(Backend("gram", "cpu", lambda _: 10, cpu_only, always(cpu.gram)))
register(triton_backend.BACKEND)
