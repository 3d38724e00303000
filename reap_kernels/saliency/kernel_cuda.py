"""CUDA saliency: launches of the combination with norms, and of the reduction into statistics."""

import torch
from torch import Tensor

from reap_kernels import cuda
from reap_kernels.saliency.measures import FIELDS, SlotMeasures
from reap_kernels.sort.slots import SortedSlots
from reap_kernels.stats import LayerStats

_MEASURES = {"norm": torch.float32, "high": torch.float32, "low": torch.float32}
_COMBINE = cuda.Kernel(
    "combine_rows",
    y=cuda.FLOATS,
    router_weights=cuda.FLOATS,
    scatter_index=torch.int64,
    offsets=torch.int64,
    out=cuda.FLOATS,
    **_MEASURES,
)
_REDUCE = cuda.Kernel(
    "reduce_slots",
    router_weights=cuda.FLOATS,
    gather_index=torch.int64,
    offsets=torch.int64,
    tile_experts=torch.int32,
    tile_rows=torch.int32,
    firsts=torch.int32,
    mask=torch.bool,
    group=torch.int64,
    partials=torch.float64,
    counts=torch.int64,
    sums=torch.float64,
    extrema=torch.float32,
    **_MEASURES,
)


def combine(
    y: Tensor,
    router_weights: Tensor,
    rows: SortedSlots | None,
    out: Tensor | None,
    measures: SlotMeasures | None,
) -> None:
    """See `saliency.measures.StageKernels.combine`; `out` has y's dtype."""
    tokens, top_k = router_weights.shape
    hidden = y.shape[1]
    _COMBINE(
        y.device,
        f"T = {tokens}, k = {top_k}, H = {hidden}, {y.dtype}",
        y=y,
        router_weights=router_weights,
        scatter_index=None if rows is None else rows.scatter_index,
        offsets=None if rows is None else rows.offsets,
        out=out,
        norm=None if measures is None else measures.norm,
        high=None if measures is None else measures.high,
        low=None if measures is None else measures.low,
        tokens=tokens,
        top_k=top_k,
        experts=0 if rows is None else rows.num_experts,
        hidden=hidden,
        wide=all(_wide(rows_of) for rows_of in (y, out) if rows_of is not None),
    )


def _wide(rows: Tensor) -> bool:
    """Whether every row begins at a multiple of 16 bytes."""
    return rows.shape[1] * rows.element_size() % 16 == 0 and rows.data_ptr() % 16 == 0


def reduce_slots(
    measures: SlotMeasures,
    router_weights: Tensor,
    rows: SortedSlots,
    stats: LayerStats,
    mask: Tensor | None,
    group: int | Tensor,
    tile: int,
) -> None:
    """See `saliency.measures.StageKernels.reduce`."""
    tiles = rows.tiles(tile)
    groups = stats.num_groups if isinstance(group, Tensor) else 1
    where = router_weights.device
    size = (FIELDS, groups, tiles.bound)
    _REDUCE(
        where,
        f"S = {router_weights.numel()}, E = {rows.num_experts}, {groups} groups",
        norm=measures.norm,
        high=measures.high,
        low=measures.low,
        router_weights=router_weights,
        gather_index=rows.gather_index,
        offsets=rows.offsets,
        tile_experts=tiles.experts,
        tile_rows=tiles.rows,
        firsts=tiles.firsts,
        mask=mask,
        group=group if isinstance(group, Tensor) else None,
        partials=torch.empty(size, dtype=torch.float64, device=where),
        counts=stats.counts,
        sums=stats.sums,
        extrema=stats.extrema,
        max_tiles=tiles.bound,
        block_m=tile,
        experts=rows.num_experts,
        top_k=rows.top_k,
        groups=stats.num_groups,
        first_group=0 if isinstance(group, Tensor) else group,
    )
