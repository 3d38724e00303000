"""accumulate: statistics of expert outputs that a host has already computed."""

import torch
from torch import Tensor

from reap_kernels.device import without_autocast
from reap_kernels.dispatch import Backend, Request, Sizes, always, register, select
from reap_kernels.errors import DtypeError, ShapeError
from reap_kernels.saliency import cpu, cuda_backend, reference, triton_backend
from reap_kernels.sort.op import cpu_only
from reap_kernels.stats import LayerStats


def accumulate(
    y: Tensor,
    expert_ids: Tensor,
    router_weights: Tensor,
    stats: LayerStats,
    *,
    mask: Tensor | None = None,
    group: int | Tensor = 0,
    backend: str | None = None,
) -> None:
    """Adds the statistics of routed rows to `stats`, in place.

    For hosts that bring their own expert outputs. `stats.tokens` is not touched, since rows do not
    say how many tokens they come from: call `stats.add_tokens`.

    Args:
        y: [S, H] float, expert outputs before the router weight, rows in any order.
        expert_ids: [S] integers; ids outside [0, E) are foreign and not counted.
        router_weights: [S] float router weights; rows of weight exactly 0 are not counted.
        stats: the layer's statistics, on the device of `y`.
        mask: [S] bool, rows that count; default all.
        group: calibration group of every row, or [S] integers.
        backend: explicit backend, never falls back.

    Raises:
        ShapeError, DtypeError: inputs that do not fit each other, or a group `stats` lacks.
        DataError: `stats` lack a field.
        BackendUnavailable: no backend serves, or the requested one refuses.

    Example:
        >>> import torch
        >>> import reap_kernels as rk
        >>> stats = rk.LayerStats(num_experts=2)
        >>> y = torch.tensor([[3.0, 4.0], [0.0, 2.0]])  # norms 5 and 2
        >>> rk.accumulate(y, torch.tensor([0, 0]), torch.tensor([0.5, 1.0]), stats)
        >>> stats.weighted_norm_sum
        tensor([[4.5000, 0.0000]], dtype=torch.float64)
    """
    if y.ndim != 2:
        raise ShapeError(f"y has shape {tuple(y.shape)}; expected [S, H]")
    if not y.dtype.is_floating_point or not router_weights.dtype.is_floating_point:
        raise DtypeError(
            f"y is {y.dtype} and router_weights {router_weights.dtype}; both must be float"
        )
    if expert_ids.dtype.is_floating_point or expert_ids.dtype == torch.bool:
        raise DtypeError(f"expert_ids is {expert_ids.dtype}; expected an integer dtype")
    for name, rows in (("expert_ids", expert_ids), ("router_weights", router_weights)):
        if tuple(rows.shape) != (len(y),):
            raise ShapeError(f"{name} has shape {tuple(rows.shape)}; expected ({len(y)},)")
    stats.check_complete()
    mask = checked_mask(mask, len(y))
    groups = group_ids(group, len(y), stats)
    request = Request(
        "saliency", y.device, y.dtype, sizes=Sizes(len(y), 1, stats.num_experts, y.shape[1])
    )
    with without_autocast(y.device):
        select(request, backend).run(y, expert_ids, router_weights, stats, mask, groups)


def checked_mask(mask: Tensor | None, rows: int) -> Tensor | None:
    """The mask as kernels read it, element after element, once it is [rows] bool or None."""
    if mask is None:
        return None
    if tuple(mask.shape) != (rows,):
        raise ShapeError(f"mask has shape {tuple(mask.shape)}; expected ({rows},)")
    if mask.dtype != torch.bool:
        raise DtypeError(f"mask is {mask.dtype}; expected torch.bool")
    return mask.contiguous()


def group_ids(group: int | Tensor, rows: int, stats: LayerStats) -> int | Tensor:
    """The group of all rows, or [rows] int64, checked against the groups of `stats`."""
    if isinstance(group, int):
        if not 0 <= group < stats.num_groups:
            raise ShapeError(
                f"group {group} leaves 0..{stats.num_groups - 1}; call stats.grow_groups first"
            )
        return group
    if tuple(group.shape) != (rows,):
        raise ShapeError(f"group has shape {tuple(group.shape)}; expected an int or ({rows},)")
    if group.dtype.is_floating_point or group.dtype == torch.bool:
        raise DtypeError(f"group is {group.dtype}; expected an integer dtype")
    if group.device.type != "cpu" or torch.compiler.is_compiling():
        # Reading values would wait for the device, or break a compiled graph; an assertion where
        # they are stops it, as torch's own index checks do.
        inside = (group >= 0) & (group < stats.num_groups)
        torch._assert_async(inside.all(), "a group id is outside the groups of the statistics")
    elif rows and not 0 <= int(group.min()) <= int(group.max()) < (stats.num_groups):
        raise ShapeError(
            f"group ids span {int(group.min())}..{int(group.max())} but the statistics have groups "
            f"0..{stats.num_groups - 1}; call stats.grow_groups first"
        )
    return group.to(torch.int64).contiguous()


register(
    Backend("saliency", "reference", lambda _: 0, lambda _: None, always(reference.accumulate))
)
register(Backend("saliency", "cpu", lambda _: 10, cpu_only, always(cpu.accumulate)))
register(triton_backend.BACKEND)
register(cuda_backend.BACKEND)
