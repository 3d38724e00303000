"""Chooses the kernels of the stages around a layer's products; `accumulate` by those kernels."""

from torch import Tensor

from reap_kernels import device
from reap_kernels.saliency.measures import TILE, SlotMeasures, Stages
from reap_kernels.stats import LayerStats


def stages(sort: str, saliency: str) -> Stages:
    """The sort and saliency each by `triton` or `cuda`; kernels are imported where they are chosen,
    since CUDA's need no Triton.
    """
    if sort == "cuda":
        from reap_kernels.sort.kernel_cuda import sort_slots
    else:
        from reap_kernels.sort.gpu import sort_slots
    if saliency == "cuda":
        from reap_kernels.saliency import kernel_cuda as kernels

        return Stages(sort_slots, kernels.combine, kernels.reduce_slots, lambda dtype: dtype)
    from reap_kernels.saliency import gpu

    return Stages(sort_slots, gpu.combine, gpu.reduce_slots, device.written_dtype)


def accumulate(
    around: Stages,
    y: Tensor,
    expert_ids: Tensor,
    router_weights: Tensor,
    stats: LayerStats,
    mask: Tensor | None,
    group: int | Tensor,
) -> None:
    """See `reap_kernels.saliency.op.accumulate`: rows are tokens of one slot each."""
    column = router_weights.reshape(-1, 1).contiguous()
    rows = around.sort(expert_ids.reshape(-1, 1), column, stats.num_experts)
    measures = SlotMeasures.empty(len(y), y.device)
    around.combine(y.contiguous(), column, None, None, measures)
    around.reduce(measures, column, rows, stats, mask, group, TILE)
