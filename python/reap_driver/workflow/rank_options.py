"""Options of planning: which experts go, how many, and from which layers."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from reap_driver.planning.criteria import CRITERIA, criterion_named
from reap_driver.workflow.fields import option, options, refused
from reap_driver.workflow.options import check_positive, read_bytes

RATIO = 0.5  # removed where no amount is given
CONTEXT = 8192  # tokens of the cache that `fits` counts, where the model has as many positions
# What can be given in place of `ratio`; plans record it by these names.
SIZES = ("keep", "target_size", "fits")
# What `protect` takes: SUPER, a layer and ids in it, or a file of them.
SUPER = "super"
Protected = str | tuple[str, tuple[int, ...]] | Path


_AMOUNT, _RANK = "how much to remove", "which experts go"
_BUDGET = "how many experts each layer loses"


@options
@dataclass(frozen=True, kw_only=True)
class RankOptions:
    """Which experts go.

    Example:
        >>> rd.RankOptions(ratio=0.25, protect="3:17,40").protected
        (('3', (17, 40)),)
        >>> rd.RankOptions(fits="16GB").fits
        16000000000
    """

    ratio: float | None = option(
        None,
        metavar="SHARE",
        group=_AMOUNT,
        exclusive="amount",
        help="share of experts to remove, above 0 and below 1, or with `shape='auto'` of their "
        f"weights (default: {RATIO})",
    )
    keep: int | None = option(
        None,
        metavar="N",
        group=_AMOUNT,
        exclusive="amount",
        help="or: keep this number of experts in every MoE layer",
    )
    target_size: int | str | None = option(
        None,
        metavar="SIZE",
        group=_AMOUNT,
        exclusive="amount",
        help="or: remove as few experts as make the weight files no larger than this, such as "
        "12GB or 11GiB",
    )
    fits: int | str | None = option(
        None,
        metavar="SIZE",
        group=_AMOUNT,
        exclusive="amount",
        help="or: remove as few as let the result run in this much memory: its weights as stored "
        "and the key-value cache of `context` tokens take 90 % of it at most",
    )
    context: int | None = option(
        None,
        metavar="TOKENS",
        group=_AMOUNT,
        needs={"fits": ()},
        help=f"tokens whose cache `fits` counts (default: {CONTEXT}, or the model's maximum if "
        "that is less)",
    )
    criterion: str = option(
        "reap",
        metavar="NAME",
        group=_RANK,
        help="what experts are ranked by; one of "
        + "; ".join(f"{name}: {known.formula}" for name, known in CRITERIA.items())
        + "; S(b,alpha,p): n^-b sum g^alpha ||f||^p; random:SEED: by chance, to compare with",
    )
    weights: Mapping[str, float] | None = option(
        None,
        metavar="GROUP=W,...",
        group=_RANK,
        help="count the groups as if their tokens had these shares (default: as observed)",
    )
    protect: str | Path | Mapping[str, Collection[int]] | Sequence[Any] = option(
        (),
        metavar="WHAT",
        group=_RANK,
        help="experts that stay, one or several of: super, those with extreme activations (above "
        "the 99.5th percentile and a tenth of the largest); LAYER:ID,ID, experts by id; a JSON or "
        "YAML file {LAYER: [ID, ...]}",
    )

    def __post_init__(self) -> None:
        read_bytes(self, "target_size", "fits")
        check_positive(self, "keep", "context")
        if self.ratio is not None and not 0 < self.ratio < 1:  # NaN is refused too
            raise refused(f"`ratio={self.ratio:g}`: give a number above 0 and below 1, such as 0.5")
        given = [name for name in ("ratio", *SIZES) if getattr(self, name) is not None]
        if len(given) > 1:
            raise refused(f"`{given[1]}`: not together with `{given[0]}`; give one of them")
        try:
            criterion_named(self.criterion)
        except ValueError as error:
            raise refused(f"`criterion`: {error}") from error
        protect = self.protect
        if isinstance(protect, Mapping):
            protect = [(layer, tuple(ids)) for layer, ids in protect.items()]
        listed = [protect] if isinstance(protect, str | Path) else protect
        object.__setattr__(self, "protect", tuple(map(_protected, listed)))

    @property
    def given(self) -> bool:
        """Whether any amount is given."""
        return any(getattr(self, name) is not None for name in ("ratio", *SIZES))

    @property
    def limit(self) -> tuple[str, int] | None:
        """`target_size` or `fits`, by name and in bytes; None where neither is given."""
        for name in ("target_size", "fits"):
            if (value := getattr(self, name)) is not None:
                return name, cast("int", value)
        return None

    @property
    def protected(self) -> tuple[Protected, ...]:
        """`protect` as a tuple, which it is once checked."""
        return cast("tuple[Protected, ...]", self.protect)


def check_context(rank: RankOptions) -> None:
    """Raises OptionError for a context that would count for nothing."""
    if rank.context is not None and rank.fits is None:
        raise refused(
            f"`context={rank.context}`: only with `fits`, or with --dry-run, which shows the cache"
        )


def _protected(given: Any) -> Protected:
    """`super`, LAYER:ID,ID or a JSON or YAML file."""
    if given == SUPER or isinstance(given, tuple | Path):
        return given
    if isinstance(given, str) and (found := re.fullmatch(r"(.+):(\d+(?:,\d+)*)", given)):
        return found[1], tuple(int(number) for number in found[2].split(","))
    if isinstance(given, str) and Path(given).suffix in (".json", ".yaml", ".yml"):
        return Path(given)
    raise refused(
        f"`protect`: {given!r} is not super, LAYER:ID,ID such as 3:17,40, or a .json or .yaml file"
    )


_LAYERS = """\
LAYER is the name of an experts module, the number in it, or a pattern such as '*.3.*'.
Transformers and serving engines read one number of experts for all layers, so every
choice here but the default makes a checkpoint they cannot load as it is."""


@options
@dataclass(frozen=True, kw_only=True)
class AllocationOptions:
    """How what is removed is shared out among layers.

    Example:
        >>> rd.AllocationOptions(allocation="global", normalize="max").normalize
        'max'
    """

    allocation: Literal["uniform", "global"] = option(
        "uniform",
        group=_BUDGET,
        about=_LAYERS,
        help="uniform: the same share of each layer; global: the lowest scores of all layers "
        "together, but never more than a router can spare",
    )
    normalize: Literal["mean", "max", "none"] | None = option(
        None,
        group=_BUDGET,
        needs={"allocation": ("global",)},
        help="with `allocation='global'`: divide each layer's scores by their mean (default) or "
        "maximum before comparing layers, or compare them as they are",
    )

    def __post_init__(self) -> None:
        if self.normalize is not None and self.allocation != "global":
            raise refused(
                f"`normalize={self.normalize}`: only with `allocation='global'`, which compares "
                "layers"
            )


@options
@dataclass(frozen=True, kw_only=True)
class BudgetOptions:
    """Layers that lose another share of their experts than the others.

    Example:
        >>> rd.BudgetOptions(layer_ratios={"3": 0.25}, skip_last=1).skip_last
        1
    """

    layer_ratios: str | Path | Mapping[str, float] | None = option(
        None,
        metavar="FILE",
        group=_BUDGET,
        about=_LAYERS,
        help="JSON or YAML {LAYER: RATIO} of layers that lose another share, 0 for none, as for "
        "layers that no token reached; of several that fit a layer the last counts; the other "
        "layers lose `ratio` all the same",
    )
    skip_first: int = option(
        0,
        metavar="N",
        group=_BUDGET,
        help="keep all experts of the first N MoE layers; the others lose no more for it",
    )
    skip_last: int = option(
        0,
        metavar="N",
        group=_BUDGET,
        help="keep all experts of the last N MoE layers; the others lose no more for it",
    )

    def __post_init__(self) -> None:
        if isinstance(self.layer_ratios, str):
            object.__setattr__(self, "layer_ratios", Path(self.layer_ratios))
        for name in ("skip_first", "skip_last"):
            if getattr(self, name) < 0:
                raise refused(f"`{name}={getattr(self, name)}`: give 0 or more")
