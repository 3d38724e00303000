"""Whether numbers can be what an observation left behind: their ranges, and how they go together.

Every rule holds exactly, or up to the rounding of float64 sums. Squares are taken of the very
numbers that are summed, so the inequality of Cauchy and Schwarz is one of them.
"""

from collections.abc import Mapping

from torch import Tensor

from reap_kernels.provenance import MAX_TOKENS

Fields = Mapping[str, Tensor]

# Relative error of a float64 sum in any order, with room to spare.
_ROUNDING = 1e-9
_COUNTS = ("count", "nonfinite")
_SUMS = (
    "router_weight_sum",
    "norm_sum",
    "weighted_norm_sum",
    "norm_sq_sum",
    "weighted_norm_sq_sum",
)
_NEVER_NEGATIVE = ("norm_sum", "norm_sq_sum", "weighted_norm_sq_sum")


def check_values(layer: str, fields: Fields, rows_per_token: int) -> None:
    """Checks the statistics of one layer.

    Args:
        layer: its name, for messages.
        fields: of `LayerStats` that are recorded, [..., G, E] each, `tokens` [..., G].
        rows_per_token: the most experts that a token is routed to.

    Raises:
        ValueError: names layer, field, group, expert, value and what it should be.
    """
    _check_counts(layer, fields, rows_per_token)
    _check_sums(layer, fields)
    _check_extrema(layer, fields)


def check_parts(layer: str, whole: Fields, parts: Fields) -> None:
    """Checks that parts [P, ...] add up to the whole [...], each being checked already.

    Raises:
        ValueError: as `check_values` does.
    """
    words = "what its parts add up to"
    for name in (*_COUNTS, "tokens"):
        _refuse(layer, name, whole[name], whole[name] != parts[name].sum(dim=0), words)
    for name in (name for name in _SUMS if name in whole):
        room = _ROUNDING * parts[name].abs().sum(dim=0)
        apart = (whole[name] - parts[name].sum(dim=0)).abs() > room
        _refuse(layer, name, whole[name], apart, words)
    for name, extreme in (("out_max", Tensor.amax), ("out_min", Tensor.amin)):
        if name in whole:
            differs = whole[name] != extreme(parts[name], dim=0)
            _refuse(layer, name, whole[name], differs, "the extreme of its parts")


def _check_counts(layer: str, fields: Fields, rows_per_token: int) -> None:
    for name in (*_COUNTS, "tokens"):
        values = fields[name]
        outside = (values < 0) | (values > MAX_TOKENS)
        _refuse(layer, name, values, outside, f"0 to {MAX_TOKENS}")
    tokens = fields["tokens"]
    total = tokens.double().sum(dim=-1, keepdim=True)
    many = (total > MAX_TOKENS).expand(tokens.shape)
    _refuse(layer, "tokens", tokens, many, f"at most {MAX_TOKENS} in all groups")
    rows = (fields["count"].double() + fields["nonfinite"].double()).sum(dim=-1)
    most = tokens.double() * rows_per_token
    words = f"no less than the rows of its experts over {rows_per_token}, as a token has so many"
    _refuse(layer, "tokens", tokens, rows > most * (1 + _ROUNDING), words)


def _check_sums(layer: str, fields: Fields) -> None:
    count = fields["count"]
    for name in (name for name in _SUMS if name in fields):
        values = fields[name]
        _refuse(layer, name, values, ~values.isfinite(), "a finite number")
        _refuse(layer, name, values, (count == 0) & (values != 0), "0, as no row was counted")
        if name in _NEVER_NEGATIVE:
            _refuse(layer, name, values, values < 0, "0 or more")
    for name, squares in (
        ("norm_sum", "norm_sq_sum"),
        ("weighted_norm_sum", "weighted_norm_sq_sum"),
    ):
        if name not in fields or squares not in fields:
            continue
        most = count.double().sqrt() * fields[squares].sqrt() * (1 + _ROUNDING)
        words = f"at most the root of count times {squares}"
        _refuse(layer, name, fields[name], fields[name].abs() > most, words)


def _check_extrema(layer: str, fields: Fields) -> None:
    empty = fields["count"] == 0
    for name, sign in (("out_max", -1), ("out_min", 1)):
        if name not in fields:
            continue
        values = fields[name]
        neutral = values.new_tensor(sign * float("inf"))
        wrong = empty & (values != neutral)
        _refuse(layer, name, values, wrong, f"{neutral.item()}, as no row was counted")
        _refuse(layer, name, values, ~empty & ~values.isfinite(), "a finite number")
    if "out_max" in fields and "out_min" in fields:
        high, low = fields["out_max"], fields["out_min"]
        _refuse(layer, "out_max", high, ~empty & (high < low), "out_min or more")


def _refuse(layer: str, name: str, values: Tensor, wrong: Tensor, expected: str) -> None:
    """Raises ValueError that names the first value that is wrong."""
    if not bool(wrong.any()):
        return
    at = wrong.nonzero()[0].tolist()
    last = ("group",) if name == "tokens" else ("group", "expert")
    names = ("part", *last)[-len(at) :]
    where = ", ".join(f"{axis} {index}" for axis, index in zip(names, at, strict=True))
    raise ValueError(
        f"layer {layer}, {where}: {name} is {values[tuple(at)].item()}; expected {expected}"
    )
