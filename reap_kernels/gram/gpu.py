"""Triton outer products of sorted rows: launches of the weighing and of the products."""

import torch
from torch import Tensor

from reap_kernels import device
from reap_kernels.dispatch import Request
from reap_kernels.experts.product import precision
from reap_kernels.gram import kernel_triton as kernels
from reap_kernels.layer_gram import LayerGram
from reap_kernels.saliency.measures import TILE
from reap_kernels.sort.gpu import schedule
from reap_kernels.sort.slots import SortedSlots
from reap_kernels.tuning import Launch, fallback
from reap_kernels.types import Routing

# Rows that do not begin at 16 bytes are loaded element by element, through registers. Tensor cores
# take blocks of at least 64 rows; float32 does without them and would spill there.
_UNALIGNED, _UNALIGNED_FLOAT32 = Launch(64, 64, 32, 1, 4, 2), Launch(32, 32, 32, 1, 4, 2)
# Columns and warps of a program that weighs rows or adds tiles.
_COLUMNS, _WARPS = 64, 8


def outer_launch(request: Request, *widths: int) -> Launch:
    """Tiles of outer products of rows that are `widths` wide; square, as the diagonal needs."""
    if any(width * request.dtype.itemsize % 16 for width in widths):
        return _UNALIGNED_FLOAT32 if request.dtype == torch.float32 else _UNALIGNED
    return fallback("down", request.dtype, TILE, device.shared_memory(request.device))


def gram(launch: Launch, h: Tensor, routing: Routing, factors: Tensor, sums: LayerGram) -> None:
    """See `reap_kernels.gram.op.gram`; `factors` as `row_factors` returns them."""
    index = routing.gather_index
    rows = SortedSlots(index, index, routing.offsets, routing.top_k, schedule)
    add_gram(launch, h.contiguous(), rows, factors, sums, TILE)


def add_gram(
    launch: Launch,
    h: Tensor,
    rows: SortedSlots,
    factors: Tensor,
    sums: LayerGram,
    tile: int,
    *,
    overwrite: bool = False,
) -> None:
    """Adds the rows of a call to all fields of `sums`.

    Args:
        launch: from `outer_launch`.
        h: [S, I] by sorted row, contiguous.
        rows: the routing.
        factors: [T, k] float64, from `row_factors`.
        sums: added to in place.
        tile: rows weighed together; an existing tile list costs nothing.
        overwrite: `h` may hold its weighted rows afterwards.
    """
    weighted = weigh(h, rows, factors, tile, sums=sums, overwrite=overwrite)
    add_outer(launch, weighted, weighted, rows, sums.gram, symmetric=True)


def weigh(
    h: Tensor,
    rows: SortedSlots,
    factors: Tensor,
    tile: int,
    *,
    sums: LayerGram | None = None,
    overwrite: bool = False,
) -> Tensor:
    """factor * h by sorted row, [S, I] in h's dtype, and 0 where a row does not count; rows that no
    expert serves are not written. Adds to all fields of `sums` but the Gram matrices.
    """
    tiles, width, where = rows.tiles(tile), h.shape[1], h.device
    dtype = device.written_dtype(h.dtype)
    out = h if overwrite and dtype == h.dtype else torch.empty_like(h, dtype=dtype)
    if not tiles.bound:
        return out.to(h.dtype)
    columns = -(-width // _COLUMNS)
    summed = (tiles.bound, width, 1) if sums is not None else (1, 1, 1)
    first = torch.empty(summed[:2], dtype=torch.float64, device=where)
    weight, count = (torch.empty(summed[0], dtype=torch.float64, device=where) for _ in range(2))
    options = {"BLOCK_N": _COLUMNS, "num_warps": _WARPS, **device.OPTIONS}
    with device.on(where):
        kernels.weigh_rows[(tiles.bound, columns)](
            h,
            factors,
            rows.gather_index,
            rows.offsets,
            *tiles.tensors,
            out,
            first,
            weight,
            count,
            rows.num_experts,
            width,
            SUMMED=sums is not None,
            BLOCK_M=tile,
            **options,
        )
        if sums is not None:
            kernels.add_moments[(rows.num_experts, columns)](
                first,
                weight,
                count,
                tiles.firsts,
                sums.first,
                sums.weight,
                sums.count,
                width,
                TILES=16,
                **options,
            )
    return out.to(h.dtype)


def add_outer(
    launch: Launch,
    a: Tensor,
    b: Tensor,
    rows: SortedSlots,
    out: Tensor,
    *,
    gather: bool = False,
    symmetric: bool = False,
) -> None:
    """out[e] += sum over the rows of expert e of a^T b.

    Args:
        launch: from `outer_launch`.
        a: [S, M] by sorted row, or [T, M] with `gather`; contiguous.
        b: [S, N] by sorted row, contiguous, in a's dtype.
        rows: the routing.
        out: [E, M, N] float32, any strides.
        gather: whether rows are looked up in `a` by token.
        symmetric: a is b; only blocks that reach the diagonal or lie below it are added to.
    """
    height, width = a.shape[1], b.shape[1]
    down, across = -(-height // launch.block_m), -(-width // launch.block_n)
    blocks = down * (down + 1) // 2 if symmetric else down * across
    if not len(b):
        return
    with device.on(b.device):
        kernels.grouped_outer[(rows.num_experts * blocks,)](
            a,
            b,
            out,
            rows.gather_index,
            rows.offsets,
            height,
            width,
            blocks,
            *out.stride(),
            TOP_K=rows.top_k,
            GATHER=gather,
            SYMMETRIC=symmetric,
            EVEN=not (height % launch.block_m or width % launch.block_n),
            PRECISION=precision(b.dtype),
            UPCAST=b.dtype == torch.bfloat16 and device.interpreted(),
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
            BLOCK_K=launch.block_k,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            **device.OPTIONS,
        )
