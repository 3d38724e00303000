"""Options of plans that keep fewer experts and fewer neurons of each: their shape."""

import math
import re
from dataclasses import dataclass

from reap_driver.workflow.fields import option, options, refused
from reap_driver.workflow.options import check_positive

SHAPE = "experts and neurons together"
AUTO = "auto"
RIDGE = 1e-3


def check_ridge(ridge: float) -> None:
    """Raises OptionError for a ridge that no least-squares problem takes."""
    if not (math.isfinite(ridge) and ridge > 0):
        raise refused(f"`ridge={ridge:g}`: give a number above 0, such as {RIDGE:g}")


def numbers_of(shape: str) -> tuple[int, int]:
    """Experts and neurons of a shape.

    Raises:
        OptionError: the text is none.

    Example:
        >>> numbers_of("96x512")
        (96, 512)
    """
    found = re.fullmatch(r"([1-9]\d{0,6})x([1-9]\d{0,6})", shape)
    if found is None:
        raise refused(
            f"`shape={shape}`: give auto, or experts and neurons that each layer keeps, such as "
            "96x512"
        )
    return int(found[1]), int(found[2])


@options
@dataclass(frozen=True, kw_only=True)
class ShapeOptions:
    """How many experts each layer keeps, and how many neurons each of those.

    Example:
        >>> rd.ShapeOptions(shape="96x512").numbers
        (96, 512)
    """

    shape: str | None = option(
        None,
        metavar="auto|ExI",
        group=SHAPE,
        about="Removes neurons of the experts that stay besides whole experts; their down\n"
        "projections are solved again, so that what is left gives the outputs closest to before.",
        help="keep E experts of every layer and I neurons of each, such as 96x512; auto takes, of "
        "the shapes that `ratio` allows, the one with the least expected error",
    )
    width_multiple: int | None = option(
        None,
        metavar="N",
        group=SHAPE,
        needs={"shape": ()},
        help="number of which the neurons of an expert must be a multiple: 128 times the "
        "tensor-parallel size of the engine, for FP8 in blocks (default: 64, or the largest "
        "divisor of 64 that divides the width now)",
    )
    ridge: float = option(
        RIDGE,
        metavar="R",
        group=SHAPE,
        needs={"shape": ()},
        help="added to the diagonal of each Gram matrix, as a share of its mean",
    )

    def __post_init__(self) -> None:
        check_positive(self, "width_multiple")
        check_ridge(self.ridge)
        if self.shape not in (None, AUTO):
            self.numbers  # noqa: B018 - refuses what is no shape
        if self.shape is None and self.width_multiple is not None:
            raise refused(f"`width_multiple={self.width_multiple}`: only with `shape`")
        if self.shape not in (None, AUTO) and self.width_multiple is not None:
            width, multiple = self.numbers[1], self.width_multiple
            if width % multiple:
                raise refused(
                    f"`shape={self.shape}`: {width} neurons are not a multiple of "
                    f"`width_multiple={multiple}`; give one that is"
                )

    @property
    def numbers(self) -> tuple[int, int]:
        """Experts and neurons of an explicit shape.

        Raises:
            OptionError: there is none.
        """
        return numbers_of(self.shape or "")
