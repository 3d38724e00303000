"""Chooses the kernels of the stages around a layer's products; `accumulate` by those kernels."""

from torch import Tensor

from reap_kernels import device
from reap_kernels.saliency.measures import TILE, SlotMeasures, StageKernels
from reap_kernels.stats import LayerStats


def stage_kernels(sort: str, saliency: str) -> StageKernels:
    """The kernels of the sort and of saliency, each `triton` or `cuda`.

    Only the chosen ones are imported, because those of CUDA do not need Triton.
    """
    if sort == "cuda":
        from reap_kernels.sort.kernel_cuda import sort_slots
    else:
        from reap_kernels.sort.gpu import sort_slots
    if saliency == "cuda":
        from reap_kernels.saliency import kernel_cuda as kernels

        return StageKernels(sort_slots, kernels.combine, kernels.reduce_slots, lambda dtype: dtype)
    from reap_kernels.saliency import gpu

    return StageKernels(sort_slots, gpu.combine, gpu.reduce_slots, device.written_dtype)


def accumulate(
    around: StageKernels,
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
