"""Muon for the training script: momentum whose update is orthogonalised, one matrix at a time.

``torch.optim.Muon`` takes 2-D parameters only; the experts here are stacked [E, rows, columns], and
each of their matrices is orthogonalised for itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# Odd quintic whose iteration pulls all singular values towards 1; the coefficients trade exactness
# (they end up in about [0.7, 1.2]) for the steepest start. Jordan et al. 2024, "Muon".
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, approximately, of each matrix in [..., rows, columns]."""
    a, b, c = _COEFFICIENTS
    x = matrix / (torch.linalg.matrix_norm(matrix, keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay.

    Parameters are [..., rows, columns]. A group's ``blocks`` says how many matrices its parameters
    hold above one another (2 for a fused gate and up projection), each orthogonalised for itself.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "blocks": 1}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                direction = p.grad.lerp(average, group["momentum"])
                update = orthogonalise(direction.unflatten(-2, (group["blocks"], -1)))
                # tall matrices would otherwise move less per element than wide ones
                scale = max(1.0, update.shape[-2] / update.shape[-1]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.flatten(-3, -2), alpha=-group["lr"] * scale)
