"""GPU expert outputs: the weights as kernels take them, and the launches of the products.

Two paths share everything but the products: our Triton kernel, which gathers rows and applies the
activation inside, and torch's grouped_mm between a gather and an activation pass of ours. Quantized
experts are read as they are by a launch of the kernel `fp8`; others dequantize them by chunks into
scratch that all chunks share; a chunk's products write the rows of its experts, in the tiles they
would have anyway: the same bits whatever the chunks.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from reap_kernels import device
from reap_kernels.activation import Activation
from reap_kernels.dequant.op import chosen as chosen_dequantize
from reap_kernels.experts import kernel_triton as kernels
from reap_kernels.experts.operands import Operand
from reap_kernels.experts.product import product, room_for
from reap_kernels.quantized import Quantized
from reap_kernels.scratch import fitting
from reap_kernels.sort.gpu import schedule
from reap_kernels.sort.slots import SortedSlots
from reap_kernels.tuning import FP8, Launch, Launches
from reap_kernels.types import ExpertWeights, Matrices, Routing

# Is given h [S, I] by sorted row, contiguous, once the outputs are computed, and may write to it.
Seen = Callable[[Tensor], None]
# Matrices of some experts, and their bias.
Side = tuple[Matrices, Tensor | None]


def first_sides(experts: ExpertWeights) -> list[Side]:
    """What the first product reads: up, fused or not, and gate where it is separate."""
    up = (experts.up, experts.up_bias)
    return [up] if experts.gate is None else [up, (experts.gate, experts.gate_bias)]


def chunks(
    rows: SortedSlots, sides: list[Side], launch: Launch
) -> Iterator[tuple[SortedSlots, list[Side]]]:
    """All experts at once where products of `launch` can read them; quantized ones some at a time,
    in scratch that holds them until the next are asked for. Nothing waits for the device.
    """
    quantized = [(m, bias) for m, bias in sides if isinstance(m, Quantized)]
    if not quantized or launch.kernel == FP8:
        yield rows, sides
        return
    experts, first = rows.num_experts, quantized[0][0]
    each = sum(math.prod(m.shape[1:]) for m, _ in quantized) * first.dtype.itemsize
    step = fitting(experts, each, first.device, quarters=1)
    room = [torch.empty(step, *m.shape[1:], dtype=m.dtype, device=m.device) for m, _ in quantized]
    dequantize = chosen_dequantize(first)
    for start in range(0, experts, step):
        stop = min(start + step, experts)
        own = rows if step >= experts else rows.part(start, stop)
        held = [out[: stop - start] for out in room]
        for (matrices, _), out in zip(quantized, held, strict=True):
            dequantize(matrices.part(start, stop), own.offsets, out)
        biases = (None if bias is None else bias[start:stop] for _, bias in quantized)
        yield own, list(zip(held, biases, strict=True))


def halves(experts: ExpertWeights, sides: list[Side] | None = None) -> tuple[Operand, Operand]:
    """(up, gate) of a gated layer: views of one fused tensor, or two tensors. `sides` are some of
    the experts, from `chunks`; default all.
    """
    (up, bias), *gate = sides or first_sides(experts)
    if gate:
        return Operand.of(up, bias), Operand.of(*gate[0])
    inner = experts.intermediate_size
    gates, ups = (slice(0, inner), slice(inner, None))
    if experts.interleaved:
        gates, ups = slice(0, None, 2), slice(1, None, 2)

    def part(rows: slice) -> Operand:
        own = None if bias is None else bias[:, rows]
        if isinstance(up, Quantized):
            return Operand.of_codes(up, own, rows)
        if isinstance(up, Tensor):
            return Operand.of(up[:, rows], own)
        return Operand.of([matrix[rows] for matrix in up], own)

    return part(ups), part(gates)


def triton_inner(
    hidden: Tensor, rows: SortedSlots, experts: ExpertWeights, launch: Launch
) -> Tensor:
    """h [S, I] by sorted row, contiguous; nothing else of that size but for an opaque activation.
    `launch` is that of the first product.
    """
    activation = experts.activation
    if activation.kind == "opaque":
        return activation.apply(_projected(hidden, rows, experts, launch)).contiguous()
    h = room_for(rows, experts.intermediate_size, hidden)
    for own, sides in chunks(rows, first_sides(experts), launch):
        up, gate = halves(experts, sides) if activation.gated else (Operand.of(*sides[0]), None)
        product(hidden, up, own, launch, gate=gate, activation=activation, gather=True, out=h)
    return h.to(hidden.dtype)


def triton_outputs(
    hidden: Tensor,
    rows: SortedSlots,
    experts: ExpertWeights,
    launches: Launches,
    seen: Seen | None = None,
) -> Tensor:
    """[S, H] expert outputs by sorted row, through h [S, I]; nothing else of that size. Every chunk
    of quantized experts has its first product before any has its second, so that scratch holds the
    matrices of one of them only.
    """
    h = triton_inner(hidden, rows, experts, launches.up)
    y = room_for(rows, experts.hidden_size, hidden)
    for own, (down,) in chunks(rows, [(experts.down, experts.down_bias)], launches.down):
        product(h, Operand.of(*down), own, launches.down, out=y)
    if seen is not None:
        seen(h)
    return y.to(hidden.dtype)


def _projected(hidden: Tensor, rows: SortedSlots, experts: ExpertWeights, launch: Launch) -> Tensor:
    """[S, 2 I] or [S, I] in the model's own layout, for an activation only the model knows."""
    found: list[Tensor] = []
    # A separate gate comes first, as its half does in a fused matrix.
    for matrices, bias in reversed(first_sides(experts)):
        width = matrices.shape[1] if isinstance(matrices, Tensor | Quantized) else len(matrices[0])
        out = room_for(rows, width, hidden)
        for own, (some,) in chunks(rows, [(matrices, bias)], launch):
            product(hidden, Operand.of(*some), own, launch, gather=True, out=out)
        found.append(out.to(hidden.dtype))
    return found[0] if len(found) == 1 else torch.cat(found, dim=-1)


def grouped_outputs(
    hidden: Tensor,
    rows: SortedSlots,
    experts: ExpertWeights,
    launches: Launches,
    seen: Seen | None = None,
) -> Tensor:
    """[S, H] expert outputs by sorted row, products by torch's grouped_mm.

    Holds gathered rows [S, H] beside the first product [S, 2 I] at its widest.
    """
    ends = rows.offsets[1:].to(torch.int32)
    gathered = hidden.index_select(0, rows.gather_index // rows.top_k)

    def multiply(a: Tensor, matrices: Matrices) -> Tensor:
        assert isinstance(matrices, Tensor)
        return torch.nn.functional.grouped_mm(a, matrices.transpose(1, 2), offs=ends)

    up = gate = multiply(gathered, experts.up)
    if experts.gate is not None:
        gate = multiply(gathered, experts.gate)
    elif experts.activation.gated:
        inner = experts.intermediate_size
        if experts.interleaved:
            gate, up = up[:, ::2], up[:, 1::2]
        else:
            gate, up = up[:, :inner], up[:, inner:]
    del gathered
    h = activated(up, gate, experts.activation, rows)
    y = multiply(h, experts.down)
    if seen is not None:
        seen(h)
    return y


def activated(up: Tensor, gate: Tensor, activation: Activation, rows: SortedSlots) -> Tensor:
    """The activation of [S, I] halves, as one pass; rows that no expert serves are not written."""
    out = torch.empty(up.shape, dtype=device.written_dtype(up.dtype), device=up.device)
    block_m, block_n = 16, 128
    grid = (-(-len(up) // block_m), -(-up.shape[1] // block_n))
    if len(up):
        with device.on(up.device):
            kernels.activate_rows[grid](
                up,
                gate,
                out,
                rows.offsets,
                rows.num_experts,
                up.shape[1],
                activation.limit,
                activation.alpha,
                *up.stride(),
                *gate.stride(),
                ACTIVATION=activation.kind,
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                **device.OPTIONS,
            )
    return out.to(up.dtype)


def expert_outputs(
    launches: Launches, hidden: Tensor, routing: Routing, experts: ExpertWeights
) -> Tensor:
    """See `reap_kernels.experts.op.expert_outputs`; `launches` are those of its products."""
    index = routing.gather_index
    rows = SortedSlots(index, index, routing.offsets, routing.top_k, schedule)
    y = triton_outputs(hidden, rows, experts, launches)
    served = torch.arange(len(index), device=index.device) < routing.offsets[-1]
    return torch.where(served[:, None], y, 0)
