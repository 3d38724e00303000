"""A whole MoE layer by CUDA kernels for Hopper: one call and one allocation, of the workspace.

`csrc/layer.cpp` launches the sort, both products, combination and reduction after one another.
"""

import torch
from torch import Tensor

from reap_kernels import cuda
from reap_kernels.errors import BackendUnavailable
from reap_kernels.experts.kernel_cuda import (
    DTYPES,
    GROUP,
    Half,
    first_halves,
    refusal,
    weight_arguments,
)
from reap_kernels.layer.call import SLOT_BYTES, LayerCall
from reap_kernels.stats import LayerStats

_WEIGHTS = ("first_table", "second_table")
_LAYER = cuda.Kernel(
    "run_layer",
    hidden=DTYPES,
    ids=cuda.INTEGERS,
    router_weights=cuda.FLOATS,
    counts=torch.int64,
    sums=torch.float64,
    extrema=torch.float32,
    mask=torch.bool,
    group=torch.int64,
    workspace=torch.uint8,
    **dict.fromkeys(_WEIGHTS, torch.uint8),
)


def observe_layer(call: LayerCall) -> Tensor:
    """See `reap_kernels.layer.op.observe_layer`."""
    hidden, experts = call.hidden, call.experts
    first, second = first_halves(experts), Half.of(experts.down, experts.down_bias)
    reason = refusal(hidden.device, *first) or refusal(hidden.device, second)
    if reason is not None:
        raise BackendUnavailable(
            f"backend 'wgmma' cannot serve this layer: {reason}; REAP_BACKEND=triton can"
        )
    sides = {"first": first, "second": (second, None)}
    weights = {
        f"{side}_{name}": value
        for side, halves in sides.items()
        for name, value in weight_arguments(*halves, hidden.device).items()
    }
    out = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    width = experts.hidden_size + experts.intermediate_size
    for tokens, part in call.parts(width * hidden.element_size() + SLOT_BYTES):
        _run(part, weights, out[tokens])
    return out


def _run(call: LayerCall, weights: dict[str, Tensor | float | None], out: Tensor) -> None:
    """Computes a call at once, into `out` [T, H]."""
    where, experts, activation = call.hidden.device, call.experts, call.experts.activation
    ids, stats = call.topk_ids, call.stats
    sizes = {
        "tokens": len(call.hidden),
        "top_k": ids.shape[1],
        "experts": experts.num_experts,
        "width": experts.hidden_size,
        "inner": experts.intermediate_size,
        "groups": 0 if stats is None else stats.num_groups,
    }
    module = cuda.required(where)
    _LAYER(
        where,
        ", ".join(f"{name} = {size}" for name, size in sizes.items()),
        **sizes,
        **weights,
        hidden=_aligned(call.hidden),
        ids=(ids if ids.dtype in cuda.INTEGERS else ids.to(torch.int64)).contiguous(),
        router_weights=call.topk_weights.contiguous(),
        formula=module.FORMULAS[activation.kind],
        limit=activation.limit,
        alpha=activation.alpha,
        tiles=GROUP,
        out=out.data_ptr(),
        workspace=_workspace(module.layer_bytes(**sizes), where),
        **_statistics(stats),
        mask=call.mask,
        group=call.group if isinstance(call.group, Tensor) else None,
        first_group=0 if isinstance(call.group, Tensor) else call.group,
    )


def _aligned(hidden: Tensor) -> Tensor:
    """Contiguous, at a multiple of 16 bytes, as kernels copy it; itself where it is so."""
    own = hidden.contiguous()
    return own.clone() if own.data_ptr() % 16 else own


def _workspace(size: int, where: torch.device) -> Tensor:
    """[size] uint8 at a multiple of 256 bytes, whatever the allocator aligns to."""
    room = torch.empty(size + 256, dtype=torch.uint8, device=where)
    start = -room.data_ptr() % 256
    return room[start : start + size]


def _statistics(stats: LayerStats | None) -> dict[str, Tensor | None]:
    """The tensors that are added to."""
    names = ("counts", "sums", "extrema")
    return {name: None if stats is None else getattr(stats, name) for name in names}
