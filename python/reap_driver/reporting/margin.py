"""The picture of the margin: how far the lowest kept expert is from the highest removed one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from reap_driver.plan.stability import Uncertainty
from reap_driver.reporting.measures import LayerMeasures
from reap_driver.reporting.style import DASHES, MUTED, SERIES, layer_ticks, new_figure

_FEW_LAYERS = 24  # up to here points are marked
_LEVEL = 0.9  # of intervals


def draw_margin(
    layers: Sequence[LayerMeasures], known: Mapping[str, Uncertainty], *, narrow: bool
) -> Figure:
    """Per layer: the scores on both sides of the cut, relative to it, and the cut's own score.

    Args:
        layers: with the plan's cut.
        known: the uncertainty of each layer's scores; empty where it is not known.
        narrow: for a phone's page.
    """
    figure = new_figure(4.4, narrow=narrow)
    beside, level = figure.subplots(2, 1, sharex=True, height_ratios=[5, 3])
    places = np.arange(len(layers))
    cuts = [layer.cut for layer in layers if layer.cut is not None]
    ids: dict[str, Sequence[int | None]] = {
        "lowest kept": [cut.lowest_kept for cut in cuts],
        "highest removed": [cut.highest_removed for cut in cuts],
    }
    few = len(layers) <= _FEW_LAYERS
    for (name, experts), colour, dash in zip(ids.items(), SERIES, DASHES, strict=False):
        values = _beside(layers, experts, [layer.scores for layer in layers])
        style = {"color": colour, "linestyle": dash, "marker": "o" if few else None}
        beside.plot(places, values, markersize=4, label=name, **style)
        if known:
            bounds = [known[layer.name].interval(_LEVEL) for layer in layers]
            low, high = (_beside(layers, experts, list(b)) for b in zip(*bounds, strict=True))
            if few:  # points have bars of their own, lines a band
                beside.errorbar(places, values, (values - low, high - values), fmt="none",
                                ecolor=colour, capsize=3, linewidth=1)  # fmt: skip
            else:
                beside.fill_between(places, low, high, color=colour, alpha=0.25, lw=0)
    beside.axhline(0, color=MUTED, linewidth=0.8)
    beside.set_title("Scores beside the cut, % above or below it")
    beside.legend(loc="upper left", ncols=2)
    beside.margins(y=0.2)
    marker = "o" if few else None
    level.plot(places, [cut.score for cut in cuts], color=SERIES[0], marker=marker, markersize=4)
    level.set(title="Score at the cut", xlabel="MoE layer")
    level.set_ylim(bottom=0)
    for axis in (beside, level):
        axis.grid(axis="y")
    layer_ticks(level, [layer.label for layer in layers], narrow=narrow)
    return figure


def _beside(
    layers: Sequence[LayerMeasures], experts: Sequence[int | None], values: Sequence[Tensor]
) -> np.ndarray:
    """How far the value of an expert of each layer is above its cut, in percent of the cut; NaN
    where there is no such expert.
    """
    found = np.full(len(layers), np.nan)
    for place, (layer, expert, of_layer) in enumerate(zip(layers, experts, values, strict=True)):
        if expert is not None and layer.cut is not None and layer.cut.score:
            found[place] = 100 * (float(of_layer[expert]) / layer.cut.score - 1)
    return found
