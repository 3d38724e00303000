"""Draws what is measured per layer: the margin of the decision, the groups served, the load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from torch import Tensor

from reap_driver.planning.stability import Uncertainty
from reap_driver.reporting.groups import specialized
from reap_driver.reporting.measures import LayerMeasures
from reap_driver.reporting.style import (
    COLORS,
    DASHES,
    INK,
    MUTED,
    SERIES,
    color_bar,
    depth_bar,
    depth_colors,
    layer_ticks,
    new_figure,
)

Layers = Sequence[LayerMeasures]

_INTERVAL = 0.9  # probability that an interval of the margin holds the true score
# Up to so many layers each point is marked; each cell has its number (by `narrow`).
_MARKED_LAYERS = 24
_NUMBERED_LAYERS = {False: 24, True: 6}
_LOAD_FLOOR = 1e-3  # of the logarithmic axis; lower loads, dead experts included, lie on it
_LOAD_POINTS = 201


def draw_margin(layers: Layers, known: Mapping[str, Uncertainty], *, narrow: bool) -> Figure:
    """Per layer: the scores on both sides of the cut, relative to it, and the score at the cut.

    Args:
        layers: with the plan's cut.
        known: the uncertainty of each layer's scores; empty where it is not known.
        narrow: for a phone's page.
    """
    figure = new_figure(4.4, narrow=narrow)
    beside, level = figure.subplots(2, 1, sharex=True, height_ratios=[5, 3])
    cuts = [layer.cut for layer in layers if layer.cut is not None]
    ids: dict[str, Sequence[int | None]] = {
        "lowest kept": [cut.lowest_kept for cut in cuts],
        "highest removed": [cut.highest_removed for cut in cuts],
    }
    for (name, experts), color, dash in zip(ids.items(), SERIES, DASHES, strict=False):
        _draw_side(beside, layers, experts, known, color=color, linestyle=dash, label=name)
    beside.axhline(0, color=MUTED, linewidth=0.8)
    beside.set_title("Scores next to the cut, % above or below it")
    beside.legend(loc="upper left", ncols=2)
    beside.margins(y=0.2)
    marker = "o" if len(layers) <= _MARKED_LAYERS else None
    places = np.arange(len(layers))
    level.plot(places, [cut.score for cut in cuts], color=SERIES[0], marker=marker, markersize=4)
    level.set(title="Score at the cut", xlabel="MoE layer")
    level.set_ylim(bottom=0)
    for axis in (beside, level):
        axis.grid(axis="y")
    layer_ticks(level, [layer.label for layer in layers], narrow=narrow)
    return figure


def _draw_side(
    axis: Any,
    layers: Layers,
    experts: Sequence[int | None],
    known: Mapping[str, Uncertainty],
    *,
    color: str,
    **style: Any,
) -> None:
    """Scores of one expert per layer, with their intervals where these are known."""
    few, places = len(layers) <= _MARKED_LAYERS, np.arange(len(layers))
    values = _above_cut(layers, experts, [layer.scores for layer in layers])
    axis.plot(places, values, color=color, marker="o" if few else None, markersize=4, **style)
    if not known:
        return
    bounds = [known[layer.name].interval(_INTERVAL) for layer in layers]
    low, high = (_above_cut(layers, experts, list(b)) for b in zip(*bounds, strict=True))
    if few:  # a bar for each point
        axis.errorbar(places, values, (values - low, high - values), fmt="none",
                      ecolor=color, capsize=3, linewidth=1)  # fmt: skip
    else:  # one band along the line
        axis.fill_between(places, low, high, color=color, alpha=0.25, lw=0)


def _above_cut(
    layers: Layers, experts: Sequence[int | None], values: Sequence[Tensor]
) -> np.ndarray:
    """How far the value of one expert per layer is above the layer's cut, in percent of the cut;
    NaN where there is no such expert.
    """
    found = np.full(len(layers), np.nan)
    for place, (layer, expert, of_layer) in enumerate(zip(layers, experts, values, strict=True)):
        if expert is not None and layer.cut is not None and layer.cut.score:
            found[place] = 100 * (float(of_layer[expert]) / layer.cut.score - 1)
    return found


def draw_groups(layers: Layers, groups: Sequence[str], *, narrow: bool) -> Figure:
    """Heat maps of groups by layers: the number of specialists; with a plan also the routing mass
    kept, and the share of specialists removed.
    """
    strips = group_strips(layers)
    figure = new_figure(
        len(strips) * (0.55 + 0.27 * len(groups) + (0.62 if narrow else 0)) + 0.4, narrow=narrow
    )
    axes = figure.subplots(len(strips), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (title, (values, unit)) in zip(axes, strips.items(), strict=True):
        low, high = _range(values, unit)
        image = axis.imshow(
            values, cmap=COLORS, vmin=low, vmax=high, aspect="auto", interpolation="none"
        )
        none = np.argwhere(~np.isfinite(values))
        axis.plot(none[:, 1], none[:, 0], ".", color=MUTED, markersize=2.5)
        axis.spines[:].set_visible(False)
        axis.set_yticks(range(len(groups)), [_short(group) for group in groups])
        axis.tick_params(left=False)
        axis.set_title(title)
        color_bar(figure, image, axis, unit, narrow=narrow)
        if len(layers) <= _NUMBERED_LAYERS[narrow]:
            _write_values(axis, values, (low + high) / 2)
    layer_ticks(axes[-1], [layer.label for layer in layers], narrow=narrow)
    axes[-1].set_xlabel("MoE layer")
    return figure


def group_strips(layers: Layers) -> dict[str, tuple[np.ndarray, str]]:
    """Title -> values [groups, layers] and their unit, for each heat map of the groups."""
    masks = [specialized(layer).numpy() for layer in layers]
    number = np.array([mask.sum(1) for mask in masks], dtype=float).T
    strips = {}
    if layers[0].cut is not None:
        kept = np.array([layer.retained_by_group for layer in layers]).T
        strips["Routing mass kept of each group"] = (100 * kept, "%")
        removed = [
            (mask & ~layer.cut.kept.numpy()).sum(1)
            for mask, layer in zip(masks, layers, strict=True)
            if layer.cut is not None
        ]
        with np.errstate(invalid="ignore"):  # NaN, drawn as a dot, where a group has none
            strips["Specialists of the group removed"] = (100 * np.array(removed).T / number, "%")
    strips["Specialists of the group, all experts"] = (number, "experts")
    return strips


def _range(values: np.ndarray, unit: str) -> tuple[float, float]:
    """Ends of the color scale, in round numbers."""
    known = values[np.isfinite(values)]
    if not len(known):
        return 0.0, 1.0
    step = 10.0 if unit == "%" else 1.0
    low, high = step * np.floor(known.min() / step), step * np.ceil(known.max() / step)
    return float(low), float(max(high, low + step))


def _write_values(axis: Any, values: np.ndarray, middle: float) -> None:
    for row, column in np.argwhere(np.isfinite(values)):
        value = values[row, column]
        axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7.5,
                  color="white" if value < middle else "black", in_layout=False)  # fmt: skip


def _short(name: str) -> str:
    return name if len(name) <= 16 else name[:15] + "…"


def draw_load(layers: Layers, *, narrow: bool) -> Figure:
    """Sorted load curves; below, per layer: the busiest expert, Gini coefficient, dead experts."""
    figure = new_figure(7.0, narrow=narrow)
    curves, *axes = figure.subplots(4, 1, height_ratios=[3, 1, 1, 1])
    labels = [layer.label for layer in layers]
    if colored_by_depth(layers):
        _draw_many_curves(curves, layers)
        depth_bar(figure, curves, labels, narrow=narrow)
    else:
        _draw_curves(curves, layers)
    _finish_curves(curves, layers)
    for axis in axes[:-1]:
        axis.sharex(axes[-1])
        axis.tick_params(labelbottom=False)
    _draw_line(axes[0], [layer.max_load for layer in layers], "Busiest expert, times the mean load")
    _draw_line(axes[1], [layer.gini for layer in layers], "Gini coefficient (0: even load)")
    axes[1].set_ylim(0, 1)
    _draw_dead(axes[2], [layer.dead for layer in layers])
    layer_ticks(axes[2], labels, narrow=narrow)
    return figure


def colored_by_depth(layers: Layers) -> bool:
    """Whether there are more load curves than dashes that tell them apart."""
    return len(layers) > len(DASHES)


def load_curves(layers: Layers) -> np.ndarray:
    """Loads by rank, [layers, points], the busiest expert first. Every layer has the same number
    of points, so that layers with different numbers of experts can be compared.
    """
    where = np.linspace(0, 1, _LOAD_POINTS)
    curves = []
    for layer in layers:
        ordered = layer.load.sort(descending=True).values.numpy()
        rank = np.minimum((where * layer.experts).astype(int), layer.experts - 1)
        curves.append(ordered[rank])
    return np.maximum(np.array(curves), _LOAD_FLOOR)


def _draw_curves(axis: Any, layers: Layers) -> None:
    """A curve for each layer."""
    where = np.linspace(0, 100, _LOAD_POINTS)
    for layer, curve, color, dash in zip(layers, load_curves(layers), SERIES, DASHES, strict=False):
        axis.plot(where, curve, color=color, linestyle=dash, label=f"layer {layer.label}")


def _draw_many_curves(axis: Any, layers: Layers) -> None:
    """A curve for each layer, colored by its place in the model."""
    where = np.linspace(0, 100, _LOAD_POINTS)
    for curve, color in zip(load_curves(layers), depth_colors(len(layers)), strict=True):
        axis.plot(where, curve, color=color, linewidth=0.9)


def _finish_curves(axis: Any, layers: Layers) -> None:
    """Axes, ticks and legend of the load curves."""
    values = load_curves(layers)
    axis.axhline(1, color=INK, linewidth=1, linestyle=DASHES[1], label="even load")
    axis.set_yscale("log")
    low, high = max(_LOAD_FLOOR, values.min() * 0.7), values.max() * 1.3
    axis.set_ylim(low, high)
    axis.set_xlim(0, 100)
    axis.set(
        title="Expert load, times the layer's mean",
        xlabel="experts, busiest first (% of the layer)",
    )
    ticks = [t for t in (0.001, 0.01, 0.1, 1, 10, 100, 1000) if low <= t <= high]
    if len(ticks) < 3:
        ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10) if low <= t <= high]
    axis.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axis.yaxis.set_minor_locator(NullLocator())
    axis.grid(axis="y")
    axis.legend(loc="lower left")


def _draw_line(axis: Any, values: Sequence[float], title: str) -> None:
    marker = "o" if len(values) <= 40 else None
    axis.plot(range(len(values)), values, color=SERIES[0], marker=marker, markersize=3)
    axis.set_title(title)
    axis.set_ylim(0, 1.1 * (max(values) or 1))
    axis.grid(axis="y")


def _draw_dead(axis: Any, dead: Sequence[int]) -> None:
    """The number of dead experts per layer."""
    axis.stairs(dead, np.arange(len(dead) + 1) - 0.5, fill=True, color=SERIES[1])
    axis.set(title="Dead experts (received no token)", xlabel="MoE layer")
    if not any(dead):
        axis.text(0.5, 0.5, "none", transform=axis.transAxes, ha="center", va="center")
    axis.set_ylim(0, max(*dead, 1) * 1.1)
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.grid(axis="y")
