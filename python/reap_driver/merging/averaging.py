"""The weights of merged experts: neurons aligned to the dominant expert's, then weighted means.

An expert computes the same whatever the order of its neurons. So before experts are averaged, the
neurons of each can be put in the order in which they are nearest to those of another.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from reap_driver.merging.scientific import scipy_needed
from reap_driver.model.expert_parts import DOWN, neuron_rows
from reap_kernels import ExpertWeights

Views = Mapping[str, Sequence[Tensor]]  # part of `ExpertWeights` -> a tensor of each expert


def merged_parts(
    weights: ExpertWeights, views: Views, group: Sequence[int], count: Tensor, *, aligned: bool
) -> dict[str, Tensor]:
    """The parts of the expert that a group of experts becomes, float64.

    The mean weighted by the tokens that were routed to each; the plain mean where there were none.

    Args:
        weights: how the parts are laid out.
        views: of all experts of the layer.
        group: ids, the dominant expert first.
        count: [E], tokens routed to each expert.
        aligned: whether neurons are aligned to those of the first expert.
    """
    shares = count[list(group)].double()
    shares = (
        shares / shares.sum() if bool(shares.sum()) else torch.full_like(shares, 1 / len(group))
    )
    rows = {part: neuron_rows(weights, part) for part in views if part not in (DOWN, "down_bias")}
    first = _of(views, group[0])
    total = {part: shares[0] * tensor for part, tensor in first.items()}
    target = neurons_of(first, rows) if aligned else None
    for share, expert in zip(shares[1:], group[1:], strict=True):
        own = _of(views, expert)
        if target is not None:
            own = reordered(own, rows, assignment(target, neurons_of(own, rows)))
        for part, tensor in own.items():
            total[part] += share * tensor
    return total


def neurons_of(expert: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> Tensor:
    """All numbers of each neuron of an expert, [I, n]: its rows of gate and up with their biases,
    and its column of the down projection.
    """
    parts = [expert[part][own].flatten(1) for part, own in rows.items()]
    return torch.cat([*parts, expert[DOWN].mT], dim=1)


def assignment(target: Tensor, neurons: Tensor) -> Tensor:
    """Which neuron takes the place of each of `target`: the permutation with the least sum of
    squared distances, int64 [I] of two [I, n].

    Raises:
        UsageError: scipy is not installed.
    """
    with scipy_needed():
        from scipy.optimize import linear_sum_assignment
    # ||a - b||^2 = ||a||^2 + ||b||^2 - 2 a b, and the squares sum to the same in any order.
    gain = (target @ neurons.mT).cpu().numpy()
    _, columns = linear_sum_assignment(gain, maximize=True)
    return torch.from_numpy(columns).long()


def reordered(
    expert: Mapping[str, Tensor], rows: Mapping[str, Tensor], order: Tensor
) -> dict[str, Tensor]:
    """An expert whose neuron n is neuron `order[n]` of the one given; it computes the same."""
    found = dict(expert)
    for part, own in rows.items():
        found[part] = torch.empty_like(expert[part])
        found[part][own] = expert[part][own[order]]
    found[DOWN] = expert[DOWN][:, order]
    return found


def _of(views: Views, expert: int) -> dict[str, Tensor]:
    """The parts of one expert, float64."""
    return {part: each[expert].detach().double() for part, each in views.items()}
