"""The picture of the calibration groups: who has specialists where, and what each one loses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from reap_driver.reporting.measures import LayerMeasures
from reap_driver.reporting.specialists import specialised
from reap_driver.reporting.style import COLOURS, MUTED, colour_bar, layer_ticks, new_figure

_FEW_LAYERS = {False: 24, True: 6}  # narrow -> up to here cells have their number written in


def draw_groups(layers: Sequence[LayerMeasures], groups: Sequence[str], *, narrow: bool) -> Figure:
    """Groups x layers: specialists; with a plan also how many of them go, and the mass it keeps."""
    strips = group_strips(layers)
    figure = new_figure(
        len(strips) * (0.55 + 0.27 * len(groups) + (0.62 if narrow else 0)) + 0.4, narrow=narrow
    )
    axes = figure.subplots(len(strips), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (title, (values, unit)) in zip(axes, strips.items(), strict=True):
        low, high = _range(values, unit)
        image = axis.imshow(
            values, cmap=COLOURS, vmin=low, vmax=high, aspect="auto", interpolation="none"
        )
        none = np.argwhere(~np.isfinite(values))
        axis.plot(none[:, 1], none[:, 0], ".", color=MUTED, markersize=2.5)
        axis.spines[:].set_visible(False)
        axis.set_yticks(range(len(groups)), [_short(group) for group in groups])
        axis.tick_params(left=False)
        axis.set_title(title)
        colour_bar(figure, image, axis, unit, narrow=narrow)
        if len(layers) <= _FEW_LAYERS[narrow]:
            _write_values(axis, values, (low + high) / 2)
    layer_ticks(axes[-1], [layer.label for layer in layers], narrow=narrow)
    axes[-1].set_xlabel("MoE layer")
    return figure


def group_strips(layers: Sequence[LayerMeasures]) -> dict[str, tuple[np.ndarray, str]]:
    """Title -> values [groups, layers] and unit, for each strip of the picture."""
    masks = [specialised(layer).numpy() for layer in layers]
    number = np.array([mask.sum(1) for mask in masks], dtype=float).T
    strips = {}
    if layers[0].cut is not None:
        kept = np.array([layer.retained_by_group for layer in layers]).T
        strips["Routing mass kept of each group"] = (100 * kept, "%")
        gone = [
            (mask & ~layer.cut.kept.numpy()).sum(1)
            for mask, layer in zip(masks, layers, strict=True)
            if layer.cut is not None
        ]
        with np.errstate(invalid="ignore"):  # NaN, drawn as a dot, where a group has none
            strips["Specialists of the group that go"] = (100 * np.array(gone).T / number, "%")
    strips["Specialists of the group, all experts"] = (number, "experts")
    return strips


def _range(values: np.ndarray, unit: str) -> tuple[float, float]:
    """Ends of the colour scale, in round numbers."""
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
                  color="white" if value < middle else "black")  # fmt: skip


def _short(name: str) -> str:
    return name if len(name) <= 16 else name[:15] + "…"
