"""The lines that a terminal shows of a server: pure functions of what was seen, and of a width."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reap_driver.base.units import short
from reap_driver.integrations.vllm.live.look import Look, Strip
from reap_driver.planning.public_provenance import which_steps
from reap_driver.reporting.measures import NEAR
from reap_driver.workflow.console import printable

LEVELS = "▁▂▃▄▅▆▇█"
PLAIN_LEVELS = "12345678"  # where the terminal's encoding has no blocks
NO_TOKEN, MASKED = "·", "x"
PLAIN_NO_TOKEN = "."
# The lowest step ends below the mean of a layer by 2^-1.5; each is half an octave.
_LOWEST = -1.5
_NAMES = 10  # columns of the names of rows
_BESIDE = 22  # columns beside a strip: kept, near, gap
_NARROW = 50  # columns below which a strip stands alone
_RED, _YELLOW, _DIM, _BOLD, _PLAIN = "\x1b[31m", "\x1b[33m", "\x1b[2m", "\x1b[1m", "\x1b[0m"


@dataclass(frozen=True)
class Style:
    """How lines are drawn.

    Attributes:
        width: columns.
        color: whether the terminal takes colors.
        blocks: whether its encoding has the characters of strips.
    """

    width: int = 80
    color: bool = False
    blocks: bool = True

    @property
    def levels(self) -> str:
        """Characters of a strip, from the lowest scores to the highest."""
        return LEVELS if self.blocks else PLAIN_LEVELS

    @property
    def no_token(self) -> str:
        """The character of experts that no token reached."""
        return NO_TOKEN if self.blocks else PLAIN_NO_TOKEN

    def painted(self, text: str, code: str) -> str:
        """A text in a color, if there are colors."""
        return f"{code}{text}{_PLAIN}" if self.color and code else text


def head_lines(seen: Look, style: Style) -> list[str]:
    """Everything above the strips."""
    status = seen.status
    versions = [
        f"{name} {status[key]}"
        for key, name in (("vllm", "vLLM"), ("version", "reap-kernels"))
        if status.get(key)
    ]
    title = f"{status.get('model') or 'a model'} at {seen.url}"
    title += f" ({', '.join(versions)})" if versions else ""
    rows = [("observing", _mode(seen)), ("tokens", _tokens(seen))]
    left = {what: n for what, n in (status.get("not_counted") or {}).items() if n}
    if left:
        each = ", ".join(f"{short(number)} {what}" for what, number in left.items())
        rows.append(("", f"not counted: {each}"))
    rows.append(("mask", _mask(seen)))
    if seen.plan is not None:
        rows += [("plan", _plan(seen)), ("margin", _margin(seen))]
    notes = (seen.problem, status.get("error"), status.get("note"), *_refused(status))
    rows += [("note", text) for text in notes if text]
    lines = [style.painted(line, _BOLD) for line in _wrapped(title, style)]
    for name, text in rows:
        lines += _wrapped(text, style, name.ljust(_NAMES))
    return lines


def _refused(status: Mapping[str, Any]) -> list[str]:
    """The layers that are not observed, a line for each reason."""
    layers: dict[str, list[str]] = {}
    for name, layer in (status.get("layers") or {}).items():
        if layer.get("refusal"):
            layers.setdefault(layer["refusal"], []).append(name)
    return [
        f"{names[0]} is not observed: {why}"
        if len(names) == 1
        else f"{names[0]} and {len(names) - 1} more layers are not observed: {why}"
        for why, names in layers.items()
    ]


def strip_lines(seen: Look, style: Style) -> tuple[list[str], list[str]]:
    """(Legend, headings and a line per layer); both are empty without statistics."""
    if not seen.strips:
        return [], []
    most = max(len(strip.scores) for strip in seen.strips)
    label = max(len("layer"), *(len(strip.label) for strip in seen.strips))
    if style.width < label + 3:
        return _legend(seen, style, most), ["layer"[: style.width]]
    beside = seen.plan is not None and style.width >= _NARROW
    room = style.width - label - 2 - (_BESIDE if beside else 0)
    each = math.ceil(most / room)
    columns = math.ceil(most / each)
    lines = [
        f"{printable(strip.label):>{label}}  {_cells(strip, each, columns, style)}"
        + (_numbers(strip) if beside else "")
        for strip in seen.strips
    ]
    titles = f"  {' ' * columns}{'kept':>8}{'near':>6}{'gap':>8}" if beside else ""
    return _legend(seen, style, each), [f"{'layer':>{label}}{titles}", *lines]


def lines_of(seen: Look, style: Style, height: int | None = None, first: int = 0) -> list[str]:
    """The whole picture.

    Args:
        seen: what is shown.
        style: how.
        height: of the terminal; None shows every layer.
        first: the layer at the top, where not all have room.
    """
    above, layers = _parts(seen, style)
    if height is None or len(above) + len(layers) <= height:
        return [*above, *layers]
    room = max(1, height - len(above) - 1)
    first = max(0, min(first, len(layers) - room))
    shown = layers[first : first + room]
    hidden = f"layers {first + 1} to {first + len(shown)} of {len(layers)}"
    return [*above, *shown, hidden[: style.width]][:height]


def hidden_layers(seen: Look, style: Style, height: int) -> int:
    """How many layers have no room in a terminal of this height."""
    above, layers = _parts(seen, style)
    if len(above) + len(layers) <= height:
        return 0
    return len(layers) - max(1, height - len(above) - 1)


def _parts(seen: Look, style: Style) -> tuple[list[str], list[str]]:
    """(What stands above the layers, a line per layer)."""
    head = head_lines(seen, style)
    legend, strips = strip_lines(seen, style)
    return ([*head, "", *legend, strips[0]], strips[1:]) if strips else (head, [])


def _cells(strip: Strip, each: int, columns: int, style: Style) -> str:
    """The strip of one layer, padded to `columns`."""
    # Lists: a tensor operation per character would take most of the time of a picture.
    scores, count = strip.scores.tolist(), strip.count.tolist()
    kept = [True] * len(scores) if strip.cut is None else strip.cut.kept.tolist()
    reached = {expert for expert, rows in enumerate(count) if rows}
    mean = _mean([scores[expert] for expert in reached])
    masked = set(strip.masked)
    cells = []
    for start in range(0, len(scores), each):
        part = range(start, min(start + each, len(scores)))
        if masked.issuperset(part):
            cells.append(style.painted(MASKED, _DIM))
            continue
        seen = [scores[expert] for expert in part if expert in reached and expert not in masked]
        shown = style.levels[level(_mean(seen), mean)] if seen else style.no_token
        cells.append(style.painted(shown, _color([kept[expert] for expert in part])))
    return "".join(cells) + " " * (columns - len(cells))


def _mean(values: Sequence[float]) -> float:
    """0 of none."""
    return math.fsum(values) / len(values) if values else 0.0


def _color(kept: Sequence[bool]) -> str:
    """Of experts, by what the plan does to them."""
    return "" if all(kept) else _YELLOW if any(kept) else _RED


def level(score: float, mean: float) -> int:
    """The step of a score, 0 to 7, by its ratio to the mean of the layer.

    Example:
        >>> [level(score, 1.0) for score in (0.1, 0.99, 1.0, 1.5, 40.0)]
        [0, 3, 4, 5, 7]
    """
    if score <= 0 or mean <= 0:
        return 0
    return max(0, min(7, math.floor(2 * (math.log2(score / mean) - _LOWEST)) + 1))


def _numbers(strip: Strip) -> str:
    """What stands beside a strip."""
    if strip.cut is None:
        return ""
    gap = "-" if strip.cut.gap is None else f"{100 * strip.cut.gap:.1f} %"
    return f"{strip.kept:>8}{strip.cut.near:>6}{gap:>8}"


def _legend(seen: Look, style: Style, each: int) -> list[str]:
    """What the characters mean.

    Args:
        seen: what is shown.
        style: how.
        each: experts per character.
    """
    low, high = 2**_LOWEST, 2 ** (_LOWEST + 3)
    text = (
        f"{style.levels[0]} to {style.levels[-1]}: score by {seen.wanted.criterion}, from below "
        f"{low:.2f} to above {high:.2f} times the layer's mean"
    )
    text += f" ({each} experts per character)" if each > 1 else ""
    text += f"; {style.no_token} no token"
    if any(strip.masked for strip in seen.strips):
        text += f", {MASKED} masked"
    if style.color and seen.plan is not None:
        text += ", red: the plan removes it" + (", yellow: some of them" if each > 1 else "")
    return _wrapped(text, style)


def _mode(seen: Look) -> str:
    """How the server observes, in words."""
    status = seen.status
    steps, observed = status.get("steps"), status.get("observed_steps")
    counted = f"{short(observed or 0)} of {short(steps)} steps" if steps else ""
    if status["mode"] == "off":
        return f"off; {counted} were observed" if counted and seen.tokens else "off"
    which = which_steps(status.get("every") or 1)
    return f"{status['mode']}, {which}" + (f"; {counted}" if counted else "")


def _tokens(seen: Look) -> str:
    """Counted tokens and their rates, by group."""
    groups = seen.status["groups"]
    if not seen.tokens:
        return "none counted so far"
    rate = f", {short(sum(seen.rates.values()))}/s" if seen.rates else ""
    total = f"{short(seen.tokens)}{rate}"
    if len(groups) < 2:
        return total
    each = [
        f"{name} {short(tokens)}"
        + (f" ({short(seen.rates[name])}/s)" if name in seen.rates else "")
        for name, tokens in groups.items()
    ]
    return f"{total}: {', '.join(each)}"


def _mask(seen: Look) -> str:
    """The mask in force, in words."""
    mask = seen.status["mask"]
    if not mask:
        return "none"
    if mask.get("source"):  # which says how many, too
        return str(mask["source"])
    counts = [mask.get(name, "?") for name in ("experts", "of", "layers")]
    return "{} of {} experts in {} layers".format(*counts)


def _plan(seen: Look) -> str:
    """The plan that the statistics would give now, in words."""
    assert seen.plan is not None
    shares = [strip.kept_mass for strip in seen.strips if strip.kept_mass is not None]
    text = seen.plan.describe().removeprefix("plan ")
    mean = sum(shares) / len(shares)
    return f"{text}, ratio {seen.plan.ratio:g}; they had {100 * mean:.1f} % of the routing mass"


def _margin(seen: Look) -> str:
    """How clear the plan's decisions are, in words."""
    cuts = [(strip.cut, strip.label) for strip in seen.strips if strip.cut is not None]
    near = sum(cut.near for cut, _ in cuts)
    experts = sum(len(strip.scores) for strip in seen.strips)
    text = f"{near} of {experts} experts within {100 * NEAR:g} % of the cut"
    gaps = [(cut.gap, label) for cut, label in cuts if cut.gap is not None]
    if gaps:
        gap, label = min(gaps)
        text += f"; smallest gap {100 * gap:.1f} % (layer {label})"
    if seen.changed is not None:
        text += f"; {seen.changed} changed side since the last look"
    return text


def _wrapped(text: str, style: Style, name: str = "") -> list[str]:
    """A row of the head, in lines of the terminal's width; names from elsewhere are printable."""
    text = printable(text)
    if style.width < 2 * _NAMES:
        return [f"{name.strip()} {text}".strip()[: style.width].rstrip()]
    indent = " " * len(name)
    return textwrap.wrap(
        text, style.width, initial_indent=name, subsequent_indent=indent, break_on_hyphens=False
    )
