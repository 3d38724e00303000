"""How many bits the weights of each expert get, given their average."""

import heapq
from collections.abc import Mapping, Sequence
from fractions import Fraction

from reap_kernels.errors import PlanError

CHOICES = (2, 3, 4, 8)
# What an expert's error counts: sum g ||f|| over its rows, what it adds to the layer's output.
CRITERION = "weighted_ean"


def expert_bits(
    scores: Mapping[str, Sequence[float]], average: float, choices: Sequence[int] = CHOICES
) -> dict[str, tuple[int, ...]]:
    """Bits for each expert, such that the sum of score * 4^-bits is least.

    One bit more halves the step between two values, so an expert's squared error falls to a fourth;
    the score says how much it counts. Every expert begins with the fewest bits, and those that gain
    most per bit get more until the average is reached. Experts of all layers share one budget, and
    count alike: they are taken to have equally many weights.

    Args:
        scores: of each layer's experts, not negative.
        average: of all experts, which is not exceeded.
        choices: numbers of bits, ascending.

    Returns:
        The bits of each layer's experts, in their order.

    Raises:
        PlanError: the average is outside the choices.

    Example:
        >>> expert_bits({"layer": [9.0, 1.0, 1.0, 0.01]}, 3)
        {'layer': (4, 3, 3, 2)}
    """
    if not choices[0] <= average <= choices[-1]:
        raise PlanError(
            f"bits {average:g}: an expert has {', '.join(map(str, choices))} bits; give an average "
            f"from {choices[0]} to {choices[-1]}"
        )
    every = [(name, expert) for name, values in scores.items() for expert in range(len(values))]
    levels = dict.fromkeys(every, 0)
    # Exact: 2.3 bits for ten experts are 3 to give out, and a float says 2.9999999999999982.
    left = int((Fraction(str(average)) - choices[0]) * len(every))
    waiting: list[tuple[float, int]] = []

    def wait(number: int) -> None:
        """Puts an expert in the queue by what one of the bits up to its next choice would gain."""
        name, expert = every[number]
        now, *more = choices[levels[name, expert] :]
        if more:
            gain = scores[name][expert] * (4.0**-now - 4.0 ** -more[0]) / (more[0] - now)
            heapq.heappush(waiting, (-gain, number))

    for number in range(len(every)):
        wait(number)
    while waiting:
        _, number = heapq.heappop(waiting)
        level = levels[every[number]]
        step = choices[level + 1] - choices[level]
        if step <= left:
            left -= step
            levels[every[number]] += 1
            wait(number)
    return {
        name: tuple(choices[levels[name, expert]] for expert in range(len(values)))
        for name, values in scores.items()
    }
