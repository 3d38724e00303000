"""Shapes of a smaller layer, E' experts of I' neurons: which fit, and what each may cost."""

import math
from collections.abc import Sequence

import torch

from reap_driver.compensation.width import WidthOrder
from reap_driver.planning.budget import Router, check_ratio, floor_of, nearest
from reap_driver.planning.shape import Shape
from reap_kernels import LayerStats
from reap_kernels.errors import PlanError

_LEAST = 0.9  # of the size asked for; shapes that are smaller are compared with unequal ones
_BLOCK = 64  # widths are multiples of it where I is: blocks of FP8 and tiles of kernels


def width_multiple(width: int) -> int:
    """What widths are multiples of by default: gcd(I, 64)."""
    return math.gcd(width, _BLOCK)


def allowed_shapes(
    router: Router, width: int, ratio: float, *, multiple: int | None = None
) -> list[Shape]:
    """The shapes that remove at least a share of a layer's expert weights, narrowest first.

    For each width there is one, with as many experts as fit into the size, unless that leaves a
    tenth of the size unused. The width I itself, which removes whole experts only, is among them.

    Args:
        router: of the layer.
        width: I.
        ratio: share of the expert weights to remove, 0 < ratio < 1.
        multiple: of which I' is a multiple; default gcd(I, 64).

    Raises:
        PlanError: no shape has that size, or the ratio or multiple is not possible.

    Example:
        >>> router = Router("layers.0", num_experts=128, top_k=8, n_group=1, topk_group=1)
        >>> [str(shape) for shape in allowed_shapes(router, 768, 0.5)]
        ['128x384', '109x448', '96x512', '85x576', '76x640', '69x704', '64x768']
    """
    check_ratio(ratio)
    step, experts = _checked_multiple(width, multiple), router.num_experts
    size = experts * width - floor_of(experts * width, ratio)
    found = []
    for narrow in sorted({*range(step, width, step), width}):
        kept = min(size // narrow, experts) // router.n_group * router.n_group
        fits = experts - kept <= router.most() and (kept, narrow) != (experts, width)
        if fits and kept * narrow >= _LEAST * size:
            found.append(Shape(kept, narrow))
    if not found:
        raise PlanError(
            f"ratio {ratio:g}: no shape of layer {router.name} keeps {1 - ratio:g} of its "
            f"{experts} experts of {width} neurons: its router needs "
            f"{experts - router.most()} experts, and widths are multiples of {step}; use a smaller "
            "ratio, or a smaller `width_multiple`"
        )
    return found


def check_shape(shape: Shape, router: Router, width: int, *, multiple: int | None = None) -> None:
    """Checks that a layer of E experts of I neurons can be cut to a shape.

    Args:
        shape: asked for.
        router, width, multiple: see `allowed_shapes`.

    Raises:
        PlanError: it cannot; the message names the nearest that fit.
    """
    step = _checked_multiple(width, multiple)
    widths = {*range(step, width, step), width}
    experts = range(router.num_experts - router.most(), router.num_experts + 1, router.n_group)
    for what, value, possible in (
        ("neurons per expert", shape.width, widths),
        ("experts", shape.experts, set(experts)),
    ):
        if value not in possible:
            near = " or ".join(map(str, nearest(possible, value)))
            why = (
                f"widths are multiples of {step}"
                if possible is widths
                else (f"its router needs {experts[0]}, in steps of {router.n_group}")
            )
            raise PlanError(
                f"shape {shape}: layer {router.name} of {router.num_experts} experts of {width} "
                f"neurons cannot keep {value} {what}: {why}; use {near}"
            )
    if shape == (router.num_experts, width):
        raise PlanError(f"shape {shape} removes nothing from layer {router.name}; ask for less")


def expected_error(
    stats: LayerStats, order: WidthOrder, kept: Sequence[int], keep: int, top_k: int
) -> float:
    """Expected size of the error of a layer's output, relative to the size of its parts.

    With squared errors per token of r, on the tokens that lose an expert, and o on all of them,
    from neurons: (q sqrt(r + o) + (1 - q) sqrt(o)) / sqrt(e). Here q is the share of tokens that
    lose at least one of their experts, taken as independent, and e the mean sum of g^2 ||f||^2 per
    token.
    It is the size and not its square that decides: acceptance falls with the first power of an
    error, so the same squared error costs less on few tokens than spread over all.

    Args:
        stats: of the layer; its groups are added up.
        order: of all its experts.
        kept: ids of the experts that stay.
        keep: I'.
        top_k: experts per token.
    """
    total = stats.total()
    energy, count = total.weighted_norm_sq_sum[0].cpu(), total.count[0].cpu()
    stays = torch.zeros(len(energy), dtype=torch.bool)
    stays[list(kept)] = True
    tokens, whole = max(int(total.tokens[0]), 1), float(energy.sum())
    if whole == 0:
        return 0.0
    lost = float(count[~stays].sum()) / (tokens * top_k)
    share = 1 - (1 - lost) ** top_k
    narrowed = float((order.error(keep).cpu() * energy)[stays].sum()) / whole
    removed = float(energy[~stays].sum()) / whole
    on_hit = math.sqrt(removed / share + narrowed) if share else 0.0
    return share * on_hit + (1 - share) * math.sqrt(narrowed)


def _checked_multiple(width: int, multiple: int | None) -> int:
    """The multiple, by default gcd(I, 64).

    Raises:
        PlanError: it is below 1 or above I.
    """
    found = width_multiple(width) if multiple is None else multiple
    if not 1 <= found <= width:
        raise PlanError(f"`width_multiple={found}` does not fit experts of {width} neurons")
    return found
