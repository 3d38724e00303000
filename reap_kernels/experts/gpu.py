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
from reap_kernels.errors import BackendUnavailable
from reap_kernels.experts import kernel_fp8, kernel_tma
from reap_kernels.experts import kernel_triton as kernels
from reap_kernels.experts.operands import Operand
from reap_kernels.experts.request import boxed
from reap_kernels.quantized import Quantized
from reap_kernels.scratch import fitting, launch_with_scratch
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


def product(
    a: Tensor,
    b: Operand,
    rows: SortedSlots,
    launch: Launch,
    *,
    gate: Operand | None = None,
    activation: Activation | None = None,
    gather: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """One grouped product with its epilogue.

    Args:
        a: [T, K] with `gather`, else [S, K] by sorted row.
        b: the right operand.
        rows: the routing.
        launch: tiles, and the kernel.
        gate: the gate half, for a gated activation.
        activation: applied to the product; None for none.
        gather: whether sorted rows are looked up in `a` by token.
        out: from `room_for`, whose rows of these experts are written and which is then returned as
            `a`'s dtype has it; default new.

    Returns:
        [S, N] in `a`'s dtype; rows that no expert serves are not written.

    Raises:
        BackendUnavailable: `launch` names the kernel `tma`, which cannot read these operands.
    """
    out = room_for(rows, b.shape[0], a) if out is None else out
    if rows.tiles(launch.block_m).bound:
        by = {"tma": _product_tma, FP8: _product_fp8}.get(launch.kernel, _product_by_pointers)
        by(a, b, gate, rows, launch, activation, gather, out)
    return out.to(a.dtype)


def _product_by_pointers(
    a: Tensor,
    b: Operand,
    gate: Operand | None,
    rows: SortedSlots,
    launch: Launch,
    activation: Activation | None,
    gather: bool,
    out: Tensor,
) -> None:
    """`product` by a program for every tile, which reads any strides."""
    (n, depth), other, tiles = b.shape, b if gate is None else gate, rows.tiles(launch.block_m)
    biased = b.bias is not None or other.bias is not None
    with device.on(a.device):
        kernels.grouped_product[(tiles.bound * -(-n // launch.block_n),)](
            a,
            b.base,
            other.base,
            b.added(biased),
            other.added(biased),
            out,
            rows.gather_index,
            rows.offsets,
            *tiles.tensors,
            rows.num_experts,
            n,
            depth,
            float("inf") if activation is None else activation.limit,
            0.0 if activation is None else activation.alpha,
            *a.stride(),
            *b.strides,
            *b.bias_strides(),
            *other.bias_strides(),
            TOP_K=rows.top_k,
            GATHER=gather,
            ACTIVATION="none" if activation is None else activation.kind,
            BIASED=biased,
            TABLE=b.table,
            ALIGNED=b.aligned and other.aligned,
            PRECISION=precision(a.dtype),
            UPCAST=a.dtype == torch.bfloat16 and device.interpreted(),
            **_tile_options(launch, n, depth),
            **device.OPTIONS,
        )


def _product_tma(
    a: Tensor,
    b: Operand,
    gate: Operand | None,
    rows: SortedSlots,
    launch: Launch,
    activation: Activation | None,
    gather: bool,
    out: Tensor,
) -> None:
    """`product` by as many programs as run at once, which read boxes."""
    (n, depth), first, tiles = b.shape, b if gate is None else gate, rows.tiles(launch.block_m)
    apart = (b.base.data_ptr() - first.base.data_ptr()) // a.element_size()
    _check_boxes(a, b, gate, apart, gather)
    biased = b.bias is not None or first.bias is not None
    programs = min(device.multiprocessors(a.device), tiles.bound * -(-n // launch.block_n))
    with device.on(a.device):
        launch_with_scratch(
            kernel_tma.grouped_product_tma[(programs,)],
            a,
            first.base,
            b.added(biased),
            first.added(biased),
            out,
            rows.gather_index,
            rows.offsets,
            *tiles.tensors,
            rows.num_experts,
            len(rows.gather_index),
            n,
            depth,
            float("inf") if activation is None else activation.limit,
            0.0 if activation is None else activation.alpha,
            *a.stride(),
            b.strides[0],
            apart,
            b.strides[1],
            *b.bias_strides(),
            *first.bias_strides(),
            TOP_K=rows.top_k,
            GATHER=gather,
            INTERLEAVED=0 < apart < b.strides[1],
            ACTIVATION="none" if activation is None else activation.kind,
            BIASED=biased,
            PRECISION=precision(a.dtype),
            UPCAST=a.dtype == torch.bfloat16 and device.interpreted(),
            **{k: v for k, v in _tile_options(launch, n, depth).items() if k != "EVEN_N"},
            **device.OPTIONS,
        )


def _product_fp8(
    a: Tensor,
    b: Operand,
    gate: Operand | None,
    rows: SortedSlots,
    launch: Launch,
    activation: Activation | None,
    gather: bool,
    out: Tensor,
) -> None:
    """`product` of FP8 codes, whose scales multiply sums of a block of K."""
    (n, depth), other, tiles = b.shape, b if gate is None else gate, rows.tiles(launch.block_m)
    scales, scales_gate = b.block_scales(), other.block_scales()
    biased = b.bias is not None or other.bias is not None
    with device.on(a.device):
        kernel_fp8.grouped_product_fp8[(tiles.bound * -(-n // launch.block_n),)](
            a,
            b.base,
            other.base,
            scales.of_blocks,
            scales_gate.of_blocks,
            b.added(biased),
            other.added(biased),
            out,
            rows.gather_index,
            rows.offsets,
            *tiles.tensors,
            rows.num_experts,
            n,
            depth,
            float("inf") if activation is None else activation.limit,
            0.0 if activation is None else activation.alpha,
            *a.stride(),
            *b.strides,
            scales.first,
            scales_gate.first,
            *scales.of_blocks.stride(),
            *b.bias_strides(),
            *other.bias_strides(),
            TOP_K=rows.top_k,
            GATHER=gather,
            STEP=scales.step,
            ROWS=scales.block[0],
            COLUMNS=scales.block[1],
            ACTIVATION="none" if activation is None else activation.kind,
            BIASED=biased,
            UPCAST=device.interpreted(),
            **_tile_options(launch, n, depth),
            **device.OPTIONS,
        )


def _check_boxes(a: Tensor, b: Operand, gate: Operand | None, apart: int, gather: bool) -> None:
    """Raises unless TMA reads the operands; `apart`: elements from a gate to its up."""
    halves = gate is None or (0 < apart < b.strides[0] and boxed(gate.base))
    own = not b.table and b.strides[0] > 0  # a matrix for each expert
    if not own or not halves or not boxed(b.base) or not (gather or boxed(a)):
        raise BackendUnavailable(
            f"the TMA kernel cannot read weights of strides {b.strides}, gate and up {apart} "
            f"elements apart, and rows of strides {a.stride()}: the last must be 1, gate and up in "
            "one tensor, all else above 0 and at multiples of 16 bytes; take a launch without "
            "`kernel`"
        )


def _tile_options(launch: Launch, n: int, depth: int) -> dict[str, int]:
    """Tiles of a product of [N, K] matrices as the kernel takes them."""
    return {
        "EVEN_N": n % launch.block_n == 0,
        "EVEN_K": depth % launch.block_k == 0,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "BLOCK_K": launch.block_k,
        "GROUP_M": launch.group_m,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }


def precision(dtype: torch.dtype) -> str:
    """Of a kernel's products: TF32 for float32 only where the user asked torch for it."""
    return "tf32" if device.tf32(dtype) else "ieee"


def room_for(rows: SortedSlots, n: int, a: Tensor) -> Tensor:
    """[S, N] for a product of `a`, in the dtype kernels write."""
    dtype = device.written_dtype(a.dtype)
    return torch.empty(len(rows.gather_index), n, dtype=dtype, device=a.device)


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
