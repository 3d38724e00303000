"""Hessians of the down projections for GPTQ and its relatives, from Gram matrices."""

from collections.abc import Sequence

import torch
from torch import Tensor

from reap_driver.base.arguments import typed
from reap_driver.planning.plan import LayerPlan
from reap_kernels import LayerGram
from reap_kernels.errors import DataError, ShapeError


@typed
def down_hessians(sums: LayerGram, plan: LayerPlan | None = None) -> Tensor:
    """Hessians of the down projections of a layer, as GPTQ takes them: no pass over the data.

    With h the input of a down projection, over the n rows that the router sent to its expert, GPTQ
    minimizes the error of W h and takes H = 2/n sum h h^T. A layer adds g W h, with g the router
    weight, so these are weighted by it: H = 2 / (sum s g^2) * sum s g^2 h h^T, with s the factor of
    the token (1 without weighted groups). Where all rows of an expert have the same g and s, both
    are equal. The scale plays no part in GPTQ, whose damping is relative to the diagonal. Rows are
    those of the routing that was observed; in a pruned model more reach the experts that are left.

    Args:
        sums: of the layer: `GramFolder.get`, or from `observe(model, gram=True)`.
        plan: of the layer, where the down projections are those of a pruned checkpoint: the
            Hessians of its experts, in its order, and of the neurons that it keeps.

    Returns:
        float32 [E', I', I'], symmetric, on the device of `sums`; E' and I' are those of `sums`
        without a plan. Of an expert without rows it is the identity, by which GPTQ rounds to the
        nearest value; a zero matrix would have it set all weights to zero.

    Raises:
        ShapeError: the plan is of another number of experts or neurons.
        DataError: sums of an expert are NaN or infinite.

    Example:
        >>> sums = rk.LayerGram(num_experts=2, intermediate_size=2)
        >>> sums.gram[0], sums.weight[0] = torch.tensor([[4.0, 0.0], [2.0, 1.0]]), 2.0
        >>> rd.down_hessians(sums)
        tensor([[[4., 2.],
                 [2., 1.]],
        <BLANKLINE>
                [[1., 0.],
                 [0., 1.]]])
    """
    width = sums.intermediate_size
    kept: Sequence[int] = range(sums.num_experts)
    neurons, narrow = None, width
    if plan is not None:
        _check_fits(sums, plan)
        kept, neurons, narrow = plan.kept, plan.neurons, plan.narrow_width or width
    shape = len(kept), narrow, narrow
    found = torch.empty(shape, dtype=torch.float32, device=sums.device)
    for place, expert in enumerate(kept):
        weight = sums.weight[expert]
        if not weight:
            found[place] = torch.eye(narrow)
            continue
        whole = sums.second(expert) * (2 / weight)
        if not bool(whole.isfinite().all()):
            raise DataError(
                f"the Gram matrix of expert {expert} is NaN or infinite: so was one of its rows; "
                "observe again in another dtype"
            )
        chosen = None if neurons is None else torch.tensor(neurons[place], device=sums.device)
        found[place] = whole if chosen is None else whole[chosen][:, chosen]
    return found


def _check_fits(sums: LayerGram, plan: LayerPlan) -> None:
    """Raises ShapeError unless the plan is of as many experts and neurons as the sums."""
    mine = sums.num_experts, sums.intermediate_size
    theirs = plan.num_experts, sums.intermediate_size if plan.width is None else plan.width
    if mine != theirs:
        raise ShapeError(
            f"plan is of {theirs[0]} experts of {theirs[1]} neurons, these sums of {mine[0]} of "
            f"{mine[1]}; give both of the same layer"
        )
