"""Optimal Brain Surgeon on neurons of many experts at once: the order in which neurons go.

For one expert with down projection W [H, I] and the Gram A [I, I] of its neurons' outputs, ridge
included, removing neuron n and correcting the others by least squares costs ||W_n||^2 / V_nn, with
V = A^-1; after it

    W <- W - W_n V_n^T / V_nn        V <- V - V_n V_n^T / V_nn.

Only the squared norms of the columns of W decide, so G = W^T W [I, I] is updated in place of W:

    G <- G - V_n u^T - u V_n^T       u = (G_n - V_n G_nn / (2 V_nn)) / V_nn.

A step needs column n and the diagonals alone. So the updates of a block of steps are kept as
factors, columns are corrected by them when they are read, and the matrices are updated once per
block by products. The result is the same as that of one update per step, up to rounding.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_STEPS = 32  # of a block


class Eliminated(NamedTuple):
    """The neurons that were removed from each of B experts, first to last, and what each cost.

    Attributes:
        neurons: int64 [B, n].
        costs: float64 [B, n], the increase of sum over rows of g^2 ||W h - W' h_kept||^2 plus the
            ridge times ||W' - W||^2.
    """

    neurons: Tensor
    costs: Tensor


def eliminate(inverse: Tensor, product: Tensor, number: int) -> Eliminated:
    """Removes neurons one after another, each time the one that costs least.

    Of equal costs the lowest index goes first.

    Args:
        inverse: V, float64 [B, I, I], inverses of the Grams; overwritten.
        product: G = W^T W, float64 [B, I, I]; overwritten.
        number: of neurons to remove from each expert, at most I.
    """
    experts, width = inverse.shape[:2]
    alive = torch.ones(experts, width, dtype=torch.bool, device=inverse.device)
    neurons = torch.empty(experts, number, dtype=torch.int64, device=inverse.device)
    costs = torch.empty(experts, number, dtype=torch.float64, device=inverse.device)
    for start in range(0, number, _STEPS):
        steps = min(_STEPS, number - start)
        part = slice(start, start + steps)
        v, u = _block(inverse, product, alive, neurons[:, part], costs[:, part])
        if start + steps < number:
            inverse.baddbmm_(v.mT, v, alpha=-1)
            product.baddbmm_(torch.cat([v, u], 1).mT, torch.cat([u, v], 1), alpha=-1)
    return Eliminated(neurons, costs)


def _block(
    inverse: Tensor, product: Tensor, alive: Tensor, neurons: Tensor, costs: Tensor
) -> tuple[Tensor, Tensor]:
    """The steps of one block: fills `neurons` and `costs`, and returns the factors of its updates:
    V -= v^T v and G -= v^T u + u^T v, each [B, steps, I].
    """
    experts, steps, width = *neurons.shape, inverse.shape[2]
    v, u = inverse.new_empty(2, experts, steps, width)
    v_diagonal = inverse.diagonal(dim1=1, dim2=2).clone()
    g_diagonal = product.diagonal(dim1=1, dim2=2).clone()
    every = torch.arange(experts, device=inverse.device)
    for step in range(steps):
        cost = (g_diagonal / v_diagonal).masked_fill_(~alive, torch.inf)
        costs[:, step], chosen = cost.min(dim=1)
        neurons[:, step] = chosen
        alive[every, chosen] = False
        v_before, u_before = v[:, :step], u[:, :step]
        own_v = v_before[every, :, chosen].unsqueeze(1)  # [B, 1, step]
        own_u = u_before[every, :, chosen].unsqueeze(1)
        v_row = inverse[every, chosen] - (own_v @ v_before)[:, 0]
        g_row = product[every, chosen] - (own_v @ u_before + own_u @ v_before)[:, 0]
        pivot, norm = v_diagonal[every, chosen, None], g_diagonal[every, chosen, None]
        root = pivot.sqrt()
        v[:, step] = v_row / root
        u[:, step] = (g_row - v_row * (norm / (2 * pivot))) / root
        v_diagonal -= v[:, step] ** 2
        g_diagonal -= 2 * v[:, step] * u[:, step]
    return v, u
