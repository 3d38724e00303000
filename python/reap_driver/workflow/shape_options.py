"""Options of plans that keep fewer experts and fewer neurons of each: their shape."""

import math
from dataclasses import dataclass
from typing import Any

from reap_driver.planning.shape import Shape
from reap_driver.workflow.fields import option, options, refused
from reap_driver.workflow.options import check_positive
from reap_driver.workflow.rank_options import (
    SIZES,
    AllocationOptions,
    BudgetOptions,
    RankOptions,
)

SHAPE = "experts and neurons together"
AUTO = "auto"
RIDGE = 1e-3


def gram_option() -> Any:
    """The Gram matrices by which neurons are removed."""
    return option(
        None,
        metavar="DIR",
        group=SHAPE,
        needs={"shape": ()},
        help="Gram matrices of the same model: the folder that `observe --gram` wrote",
    )


def check_ridge(ridge: float) -> None:
    """Raises OptionError for a ridge that no least-squares problem takes."""
    if not (math.isfinite(ridge) and ridge > 0):
        raise refused(f"`ridge={ridge:g}`: give a number above 0, such as {RIDGE:g}")


@options
@dataclass(frozen=True, kw_only=True)
class ShapeOptions:
    """How many experts each layer keeps, and how many neurons each of those.

    Example:
        >>> rd.ShapeOptions(shape="96x512").explicit
        Shape(experts=96, width=512)
    """

    shape: str | None = option(
        None,
        metavar="auto|ExI",
        group=SHAPE,
        about="Removes neurons of the experts that stay besides whole experts; their down\n"
        "projections are solved again, so that what is left gives the outputs closest to before.",
        help="keep E experts of every layer and I neurons of each, such as 96x512; auto takes, of "
        "the shapes that `ratio` allows, the one with the least expected error, and in a search "
        "the one that follows the model most closely",
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
        if self.shape is None and self.width_multiple is not None:
            raise refused(f"`width_multiple={self.width_multiple}`: only with `shape`")
        if self.shape is None and self.ridge != RIDGE:
            raise refused(f"`ridge={self.ridge:g}`: only with `shape`")
        shape, multiple = self.explicit, self.width_multiple
        if shape is not None and multiple is not None and shape.width % multiple:
            raise refused(
                f"`shape={shape}`: {shape.width} neurons are not a multiple of "
                f"`width_multiple={multiple}`; give one that is"
            )

    @property
    def explicit(self) -> Shape | None:
        """The shape that is given; None where there is none, or where it is to be chosen.

        Raises:
            OptionError: the text is no shape.
        """
        if self.shape in (None, AUTO):
            return None
        try:
            return Shape.parse(str(self.shape))
        except ValueError as error:
            raise refused(f"`shape={self.shape}`: {error}") from error

    @property
    def settings(self) -> dict[str, Any]:
        """What plans record of them."""
        given = {"shape": self.shape, "ridge": self.ridge}
        multiple = self.width_multiple
        return given if multiple is None else {**given, "width_multiple": multiple}


def check_shape_alone(
    shape: ShapeOptions,
    rank: RankOptions,
    budget: BudgetOptions,
    allocation: AllocationOptions | None = None,
) -> None:
    """Raises OptionError for options that contradict a shape, which is the same for all layers."""
    if shape.shape is None:
        return
    text = f"`shape={shape.shape}`"
    given = [name for name in ("ratio", *SIZES) if getattr(rank, name) is not None]
    if given and shape.explicit is not None:
        raise refused(f"{text}: says how much stays, so `{given[0]}` cannot; give one of them")
    if given and given[0] != "ratio":
        raise refused(
            f"{text}: not together with `{given[0]}`; give a `ratio`, of the weights of experts"
        )
    differing = {
        "layer_ratios": budget.layer_ratios is not None,
        "skip_first": budget.skip_first > 0,
        "skip_last": budget.skip_last > 0,
        "allocation='global'": allocation is not None and allocation.allocation == "global",
    }
    for name in (name for name, is_given in differing.items() if is_given):
        raise refused(
            f"`{name}`: not together with {text}, which is the same for all layers, as engines "
            "need it; leave one of them out"
        )


def check_gram(options: ShapeOptions, gram: Any, out: Any) -> None:
    """Raises OptionError for a shape without Gram matrices or place for matrices, and for Gram
    matrices without a shape.
    """
    shape = options.shape
    if shape is None and gram is not None:
        raise refused(f"`gram={gram}`: only with `shape`")
    if shape is not None and gram is None:
        raise refused(
            f"`shape={shape}`: needs `gram`, the folder of Gram matrices that `reap-kernels "
            "observe --gram` writes"
        )
    if shape is not None and out is None:
        raise refused(f"`shape={shape}`: needs `out`, beside which the new down projections go")
