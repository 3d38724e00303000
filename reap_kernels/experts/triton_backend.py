"""When the `triton` backend serves `experts`, and the self-check of the grouped products."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from reap_kernels import device, selfcheck
from reap_kernels.activation import Activation
from reap_kernels.device import tf32
from reap_kernels.dispatch import Backend, Request
from reap_kernels.experts import reference
from reap_kernels.sort import reference as sort_reference
from reap_kernels.sort.triton_backend import limits, priority
from reap_kernels.testing import (
    Case,
    make_experts,
    make_inputs,
    make_quantized_experts,
    relative_error,
)
from reap_kernels.tuning import FP8, KERNELS, Launch, Launches, Problem, choose_backend
from reap_kernels.types import ExpertWeights, Routing

# ||got - want|| / ||want||. bf16 rounds the activation and the output to 8 bits.
_OUTPUT_BOUND = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
# Tensor cores multiply no less than this along K.
_LEAST_DEPTH = 16
# Registers of a thread for sums where one block of K has sums of its own.
_SUMS_OF_CODES = 128
# TF32 keeps 10 bits of each factor, and twice.
_TF32_BOUND = 2e-3


def refusal(request: Request) -> str | None:
    """Why `experts` cannot be served, or None."""
    return product_limits(request) or selfcheck.verdict(
        "experts", request.device, facts(request), lambda: check(request)
    )


def product_limits(request: Request) -> str | None:
    """Why the grouped products cannot serve, as far as is known without running them."""
    if request.layout == "mixed":
        return (
            "the experts' matrices, or gate and up, differ in strides, and one launch reads all "
            "of them alike; make them contiguous"
        )
    return limits(request)


def note(request: Request) -> str:
    """What a user should know of a call that is served."""
    notes = []
    if limits(request) is None:  # else the device has no launch table
        asked = _launches(request, KERNELS)
        if "tma" in (asked.up.kernel, asked.down.kernel) and not reads_codes(request):
            reason = tma_limits(request)
            told = "products by TMA" if reason is None else f"products by pointers: {reason}"
            notes.append(told)
    if request.layout == "quantized":
        notes.append(_note_of_codes(request))
    if request.activation == "opaque":
        notes.append(
            "the activation is the model's own torch function, run between the two products"
        )
    return "; ".join(notes)


def tma_limits(request: Request) -> str | None:
    """Why TMA cannot read the operands of a request, whatever the launch table says; or None."""
    if not device.tma(request.device):
        return f"TMA is there from sm_90 on, this is {device.architecture(request.device)}"
    if request.layout not in ("stacked", "quantized"):
        return "TMA reads experts that are stacked in one tensor"
    sizes = {"H": request.sizes.hidden, "I": request.sizes.intermediate}
    for name, size in sizes.items():
        if size * request.dtype.itemsize % 16:
            return f"TMA reads rows of multiples of 16 bytes; {name} is {size}"
    if request.boxes in ("", "apart"):
        return (
            "TMA reads weights whose rows are contiguous and begin at multiples of 16 bytes, a "
            "matrix for each expert, with gate and up in one tensor"
        )
    return None


def _note_of_codes(request: Request) -> str:
    """How quantized experts are read."""
    if reads_codes(request):
        return "products read FP8 codes and their scales, without dequantizing"
    told = "experts are dequantized to bf16 by chunks"
    reason = code_limits(request)
    return f"{told}: {reason}" if reason is not None and _asks_for_codes(request) else told


def _asks_for_codes(request: Request) -> bool:
    """Whether the launch table wants products to read quantized experts."""
    sizes = (request.sizes.intermediate, request.sizes.rows)
    return choose_backend(request.device, "quantized", request.dtype, *sizes) == "product"


def code_limits(request: Request) -> str | None:
    """Why no product can read quantized experts, whatever the launch table says; or None."""
    if request.block is None:
        return "products read the format fp8_block alone"
    if request.block[1] < _LEAST_DEPTH:
        return f"products read blocks of {_LEAST_DEPTH} columns or more, not of {request.block[1]}"
    arch = device.architecture(request.device)
    if arch != "interpreter" and not (arch.startswith("sm") and int(arch[2:]) >= 89):
        return f"GPUs convert FP8 codes from sm_89 on, this is {arch}"
    return None


def reads_codes(request: Request) -> bool:
    """Whether products read a request's experts as they are quantized."""
    return (
        request.layout == "quantized" and code_limits(request) is None and _asks_for_codes(request)
    )


def for_codes(launch: Launch, columns: int, *, gated: bool, plain: bool = True) -> Launch:
    """A launch whose tiles leave registers for the sums of one block of K beside all sums, and
    whose blocks of K have one scale each.

    Args:
        launch: of a product of bf16.
        columns: elements of K that share a scale.
        gated: whether it has two accumulators.
        plain: no biases, sizes of whole tiles, and tensor cores that read shared memory, as those
            of sm_90 and sm_100: all else needs registers of its own.
    """
    most = _SUMS_OF_CODES // (2 if gated and not plain else 1) * 32 * launch.num_warps
    sums, width = (3 if gated else 2) * launch.block_m, launch.block_n
    while sums * width > most and width > _LEAST_DEPTH:
        width //= 2
    depth = min(launch.block_k, columns)
    return replace(launch, block_n=width, block_k=depth, kernel=FP8)


def launches(request: Request) -> Launches:
    """Launches of the two products of a request."""
    if request.block is not None and reads_codes(request):
        found, columns = _launches(request, KERNELS[:1]), request.block[1]
        gated = request.activation not in ("relu2", "opaque")
        uneven = request.sizes.hidden % 128 or request.sizes.intermediate % 128
        shared = device.architecture(request.device) in ("sm90", "sm100")
        plain = shared and not (request.biased or uneven)
        return Launches(
            for_codes(found.up, columns, gated=gated, plain=plain),
            for_codes(found.down, columns, gated=False),
        )
    return _launches(request, KERNELS if tma_limits(request) is None else ("pointer",))


def _launches(request: Request, kernels: tuple[str, ...]) -> Launches:
    """Launches of the first of these kernels that the table names."""
    sizes = request.sizes
    return Problem(
        request.device,
        request.dtype,
        request.activation,
        sizes.hidden,
        sizes.intermediate,
        sizes.rows,
        plain=_seen(request) == "stacked" and not request.biased,
        kernels=kernels,
    ).launches()


def _seen(request: Request) -> str:
    """The layout products see: quantized experts are dequantized into stacked ones."""
    return "stacked" if request.layout == "quantized" else request.layout


def facts(request: Request) -> dict[str, Any]:
    """What the compiled products depend on."""
    chosen = launches(request)
    hidden, intermediate = _small_sizes(request)
    return {
        "dtype": request.dtype,
        "hidden": hidden,
        "intermediate": intermediate,
        "top_k": request.sizes.top_k,
        "activation": request.activation,
        "layout": _seen(request),
        "boxes": _halves(request, chosen.up),
        "block": request.block if chosen.up.kernel == FP8 else None,
        "biased": request.biased,
        "tf32": tf32(request.dtype),
        "up": chosen.up,
        "down": chosen.down,
    }


def _halves(request: Request, up: Launch) -> str:
    """How gate and up lie, as far as the code of the first product depends on it."""
    if up.kernel == "tma":
        return request.boxes
    return "interleaved" if up.kernel == FP8 and request.boxes == "interleaved" else ""


def _small_sizes(request: Request) -> tuple[int, int]:
    """H and I of a small layer that compiles to the request's own code: the code depends on what
    tiles leave over, so these leave over the same.
    """
    chosen = launches(request)
    along_hidden = max(chosen.up.block_k, chosen.down.block_n)
    along_intermediate = max(chosen.up.block_n, chosen.down.block_k)
    if request.block is not None and chosen.up.kernel == FP8:  # several blocks of scales
        along_hidden = max(along_hidden, *request.block)
        along_intermediate = max(along_intermediate, *request.block)
    return (
        2 * along_hidden + request.sizes.hidden % along_hidden,
        2 * along_intermediate + request.sizes.intermediate % along_intermediate,
    )


def check_layer(request: Request) -> tuple[Case, ExpertWeights]:
    """A small layer whose products take the request's launches over whole tiles, partly filled ones
    and an empty expert.
    """
    chosen = launches(request)
    hidden, intermediate = _small_sizes(request)
    case = Case(
        "self-check",
        "every tile boundary once",
        tokens=3 * max(chosen.up.block_m, chosen.down.block_m) + 5,
        experts=request.sizes.top_k + 3,
        top_k=request.sizes.top_k,
        hidden=hidden,
        intermediate=intermediate,
        skew="zipf",
        foreign=0.1,
    )
    interleaved = request.biased or request.boxes == "interleaved"
    layout = {"table": "per-expert"}.get(
        request.layout, "interleaved-biased" if interleaved else "stacked"
    )
    own = Activation("silu").apply if request.activation == "opaque" else None
    activation = Activation(request.activation, limit=0.7, fn=own)
    if request.activation == "relu2":
        layout = "ungated"
    if request.block is not None and chosen.up.kernel == FP8:
        experts = make_quantized_experts(
            case, "fp8_block", layout, activation, device=request.device, block=request.block
        )
    else:
        experts = make_experts(case, layout, activation, request.dtype, device=request.device)
    if chosen.up.kernel in ("tma", FP8) and request.boxes != "interleaved":
        experts = replace(experts, interleaved=False)  # the weights are random: in any order
    if not request.biased:
        experts = replace(experts, up_bias=None, gate_bias=None, down_bias=None)
    return case, experts


def output_bound(dtype: torch.dtype) -> float:
    """Largest relative error (Frobenius) of outputs computed in `dtype`."""
    return _TF32_BOUND if tf32(dtype) else _OUTPUT_BOUND[dtype]


def check(request: Request) -> str | None:
    """Compares expert outputs with the reference's."""
    case, experts = check_layer(request)
    inputs = make_inputs(case, request.dtype, device=request.device)
    routing = sort_reference.sort_by_expert(inputs.topk_ids, inputs.topk_weights, case.experts)
    want = reference.expert_outputs(inputs.hidden, routing, experts)
    error = relative_error(prepare(request)(inputs.hidden, routing, experts), want)
    bound = output_bound(request.dtype)
    return None if error <= bound else f"outputs are off by {error:.1e}, {bound:.0e} is allowed"


def prepare(request: Request) -> Callable[[Tensor, Routing, ExpertWeights], Tensor]:
    """See `reap_kernels.experts.op.expert_outputs`."""
    from reap_kernels.experts import gpu

    return partial(gpu.expert_outputs, launches(request))


BACKEND = Backend("experts", "triton", priority, refusal, prepare, note)
