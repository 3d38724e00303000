"""Student's t distribution: its quantiles, and draws from it that are the same on every machine.

Written by hand: scipy would be a dependency for one quantile, and generators of random numbers in
torch and numpy do not promise equal draws across versions and machines.
"""

import math
from random import Random
from statistics import NormalDist

import torch
from torch import Tensor


def normal(rows: int, columns: int, seed: int) -> Tensor:
    """Standard normal numbers, float64 [rows, columns]; the same on every machine."""
    draw, normal = Random(seed), NormalDist()
    values = [normal.inv_cdf((draw.getrandbits(32) + 0.5) / 2**32) for _ in range(rows * columns)]
    return torch.tensor(values, dtype=torch.float64).reshape(rows, columns)


def student(noise: Tensor, parts: int) -> Tensor:
    """Multipliers of `parts` deviations, [D, parts]: jointly Student's t with parts - 1 degrees."""
    chi = noise[:, parts : 2 * parts - 1].square().mean(dim=1, keepdim=True)
    return noise[:, :parts] / chi.sqrt()


def t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t for a probability above 0.5, by bisection."""
    low, high = 0.0, 1.0
    while _t_probability(high, degrees) < probability:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        if _t_probability(middle, degrees) < probability:
            low = middle
        else:
            high = middle
    return high


def _t_probability(t: float, degrees: int) -> float:
    """P(T <= t) for t >= 0 and whole degrees: Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine, odd = math.cos(angle), degrees % 2
    term = cosine if odd else 1.0
    series = term if degrees > 1 else 0.0
    for k in range(3 if odd else 2, degrees - 1, 2):
        term *= cosine**2 * (k - 1) / k
        series += term
    series *= math.sin(angle)
    inside = (angle + series) * 2 / math.pi if odd else series
    return 0.5 + inside / 2
