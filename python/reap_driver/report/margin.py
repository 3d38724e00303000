"""The picture of the margin: how far the lowest kept expert is from the highest removed one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from reap_driver.report.measures import LayerMeasures
from reap_driver.report.style import DASHES, MUTED, SERIES, layer_ticks, new_figure
from reap_driver.stability import Uncertainty

_FEW_LAYERS = 40  # up to here points are marked
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
    for (name, experts), colour, dash in zip(ids.items(), SERIES, DASHES, strict=False):
        values = [_percent(la, e, la.scores) for la, e in zip(layers, experts, strict=True)]
        marker = "o" if len(layers) <= _FEW_LAYERS else None
        beside.plot(
            places, values, color=colour, linestyle=dash, marker=marker, markersize=4, label=name
        )
        if known:
            bounds = [known[layer.name].interval(_LEVEL) for layer in layers]
            low, high = (
                [_percent(la, e, b[side]) for la, e, b in zip(layers, experts, bounds, strict=True)]
                for side in (0, 1)
            )
            beside.fill_between(places, low, high, color=colour, alpha=0.25, lw=0)
    beside.axhline(0, color=MUTED, linewidth=0.8)
    beside.set_title("Scores beside the cut, % above or below it")
    beside.legend(loc="upper left", ncols=2)
    beside.margins(y=0.2)
    level.plot(places, [cut.score for cut in cuts], color=SERIES[0])
    level.set(title="Score at the cut", xlabel="MoE layer")
    level.set_ylim(bottom=0)
    for axis in (beside, level):
        axis.grid(axis="y")
    layer_ticks(level, [layer.label for layer in layers], narrow=narrow)
    return figure


def _percent(layer: LayerMeasures, expert: int | None, values: Tensor) -> float:
    """How far the value of an expert is above its layer's cut, in percent of the cut."""
    cut = 0.0 if layer.cut is None else layer.cut.score
    return float("nan") if expert is None or not cut else 100 * (float(values[expert]) / cut - 1)
