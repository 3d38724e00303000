"""The picture of the load: how unevenly the router used the experts, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from reap_driver.reporting.measures import LayerMeasures
from reap_driver.reporting.style import DASHES, SERIES, layer_ticks, new_figure

_FEW_LAYERS = len(DASHES)  # up to here each layer has a curve of its own
_FLOOR = 1e-3  # of the logarithmic axis; what is below, dead experts too, lies on it
_POINTS = 201


def load_curves(layers: Sequence[LayerMeasures]) -> np.ndarray:
    """Loads by rank, [layers, points]: the busiest expert on the left, the idlest on the right, so
    that layers with different numbers of experts can be laid over each other.
    """
    where = np.linspace(0, 1, _POINTS)
    curves = []
    for layer in layers:
        ordered = layer.load.sort(descending=True).values.numpy()
        rank = np.minimum((where * layer.experts).astype(int), layer.experts - 1)
        curves.append(ordered[rank])
    return np.array(curves)


def draw_load(layers: Sequence[LayerMeasures], *, narrow: bool) -> Figure:
    """Sorted load curves; below, per layer: the busiest expert, Gini coefficient, dead experts."""
    figure = new_figure(7.0, narrow=narrow)
    curves, *axes = figure.subplots(4, 1, height_ratios=[3, 1, 1, 1])
    _draw_curves(curves, layers)
    for axis in axes[:-1]:
        axis.sharex(axes[-1])
        axis.tick_params(labelbottom=False)
    _line(axes[0], [layer.max_load for layer in layers], "Busiest expert, times the mean load")
    _line(axes[1], [layer.gini for layer in layers], "Gini coefficient (0: even load)")
    axes[1].set_ylim(0, 1)
    edges = np.arange(len(layers) + 1) - 0.5
    dead = [layer.dead for layer in layers]
    axes[2].stairs(dead, edges, fill=True, color=SERIES[1])
    axes[2].set(title="Dead experts (no token came)", xlabel="MoE layer")
    if not any(dead):
        axes[2].text(0.5, 0.5, "none", transform=axes[2].transAxes, ha="center", va="center")
    axes[2].set_ylim(0, max(*dead, 1) * 1.1)
    axes[2].yaxis.get_major_locator().set_params(integer=True)
    axes[2].grid(axis="y")
    layer_ticks(axes[2], [layer.label for layer in layers], narrow=narrow)
    return figure


def _line(axis: Any, values: Sequence[float], title: str) -> None:
    marker = "o" if len(values) <= 40 else None
    axis.plot(range(len(values)), values, color=SERIES[0], marker=marker, markersize=3)
    axis.set_title(title)
    axis.set_ylim(0, 1.1 * (max(values) or 1))
    axis.grid(axis="y")


def _draw_curves(axis: Any, layers: Sequence[LayerMeasures]) -> None:
    where = np.linspace(0, 100, _POINTS)
    values = np.maximum(load_curves(layers), _FLOOR)
    if len(layers) <= _FEW_LAYERS:
        for layer, curve, colour, dash in zip(layers, values, SERIES, DASHES, strict=False):
            axis.plot(where, curve, color=colour, linestyle=dash, label=f"layer {layer.label}")
    else:
        low, tenth, middle, ninetieth, high = np.quantile(values, [0, 0.1, 0.5, 0.9, 1], axis=0)
        axis.fill_between(where, low, high, color=SERIES[0], alpha=0.18, lw=0, label="all layers")
        axis.fill_between(
            where, tenth, ninetieth, color=SERIES[0], alpha=0.35, lw=0, label="80 % of layers"
        )
        axis.plot(where, middle, color=SERIES[0], linewidth=1.6, label="median layer")
    axis.axhline(1, color=SERIES[4], linewidth=1, linestyle=DASHES[1], label="even load")
    axis.set_yscale("log")
    axis.set_ylim(max(_FLOOR, values.min() * 0.7), values.max() * 1.3)
    axis.set_xlim(0, 100)
    axis.set(
        title="Expert load, times the layer's mean",
        xlabel="experts, busiest first (% of the layer)",
    )
    low, high = axis.get_ylim()
    ticks = [t for t in (0.001, 0.01, 0.1, 1, 10, 100, 1000) if low <= t <= high]
    if len(ticks) < 3:
        ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10) if low <= t <= high]
    axis.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axis.yaxis.set_minor_locator(NullLocator())
    axis.grid(axis="y")
    axis.legend(loc="lower left")
