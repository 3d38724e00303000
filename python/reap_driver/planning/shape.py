"""Shapes of a layer, experts x neurons. Without torch, because `--help` and options name them."""

import re
from typing import NamedTuple


class Shape(NamedTuple):
    """What each layer keeps: `experts` of `width` neurons; as text `96x512`."""

    experts: int
    width: int

    def __str__(self) -> str:
        return f"{self.experts}x{self.width}"

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """The shape that a text such as `96x512` means.

        Raises:
            ValueError: it means none.

        Example:
            >>> Shape.parse("96x512")
            Shape(experts=96, width=512)
        """
        found = re.fullmatch(r"([1-9]\d{0,6})[xX]([1-9]\d{0,6})", text.strip())
        if found is None:
            raise ValueError(
                "give auto, or experts and neurons that each layer keeps, such as 96x512"
            )
        return cls(int(found[1]), int(found[2]))
