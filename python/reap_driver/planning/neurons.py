"""Which neurons of an expert are kept: checks of their ids, and their bitmaps in plan files."""

import itertools
from collections.abc import Sequence
from typing import Any

from reap_kernels.errors import PlanError
from reap_kernels.schema import short

MAX_WIDTH = 1_000_000  # neurons of an expert

Neurons = tuple[tuple[int, ...], ...]


def check_neurons(width: Any, neurons: Any, experts: int) -> None:
    """Checks the kept neurons of the experts of a layer.

    Args:
        width: I, the neurons of an expert before the cut.
        neurons: per kept expert, the ids of the neurons that it keeps.
        experts: number of kept experts.

    Raises:
        PlanError: not one ascending list of ids in 0..I - 1 per expert, or lists of different
            lengths.
    """
    if type(width) is not int or not 1 <= width <= MAX_WIDTH:
        raise PlanError(f"width is {short(width)}; give a whole number, 1 to {MAX_WIDTH}")
    if not isinstance(neurons, tuple) or any(not isinstance(ids, tuple) for ids in neurons):
        raise PlanError(f"neurons is {short(neurons)}; give a tuple of ids for each kept expert")
    if len(neurons) != experts:
        raise PlanError(f"neurons has {len(neurons)} entries for {experts} kept experts; give each")
    for number, ids in enumerate(neurons):
        where = f"neurons[{number}]"
        if not ids:
            raise PlanError(f"{where} is empty; an expert needs neurons")
        if any(type(n) is not int or not 0 <= n < width for n in ids):
            raise PlanError(f"{where} holds other things than ids in 0..{width - 1}: {short(ids)}")
        if any(a >= b for a, b in itertools.pairwise(ids)):
            raise PlanError(f"{where} is not ascending without repetition: {short(ids)}")
        if len(ids) != len(neurons[0]):
            raise PlanError(
                f"{where} has {len(ids)} neurons, neurons[0] has {len(neurons[0])}; the experts of "
                "a layer are stored with one width, so all keep equally many"
            )


def to_bitmap(ids: Sequence[int], width: int) -> str:
    """The neurons that an expert keeps, as a hexadecimal number whose bit n stands for neuron n.

    Example:
        >>> to_bitmap((0, 2, 5), width=6)
        '25'
    """
    return f"{sum(1 << n for n in ids):0{-(-width // 4)}x}"


def from_bitmap(text: str, width: int) -> tuple[int, ...]:
    """The ids, ascending, that `to_bitmap` made a text of.

    Raises:
        ValueError: it is not such a text; says what it is.
    """
    digits = -(-width // 4)
    if len(text) != digits or not set(text) <= set("0123456789abcdef"):
        raise ValueError(
            f"is {short(text)}; a width of {width} takes {digits} hexadecimal digits in lower case"
        )
    bits = int(text, 16)
    if bits >> width:
        raise ValueError(f"has bits beyond the width of {width}: {short(text)}")
    return tuple(n for n in range(width) if bits >> n & 1)
