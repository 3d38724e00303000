"""Draws the cut: scores by rank with the cut, scores by expert id, experts kept per layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from reap_driver.reporting.measures import LayerMeasures
from reap_driver.reporting.style import (
    COLORS,
    DASHES,
    GRID,
    INK,
    SERIES,
    color_bar,
    layer_ticks,
    new_figure,
)

Layers = Sequence[LayerMeasures]

# Up to so many experts per layer, and layers, every expert has a mark or its number.
_FEW_EXPERTS, _FEW_LAYERS = 64, 16


def ratios(layers: Layers) -> np.ndarray:
    """log2 of score over the layer's cut (over its median without a plan): float64
    [experts, layers]. Rows behind a layer's last expert are NaN; a score of 0 gives -inf.
    """
    grid = np.full((max(layer.experts for layer in layers), len(layers)), np.nan)
    for column, layer in enumerate(layers):
        scores = layer.scores.numpy()
        middle = float(np.median(scores)) if layer.cut is None else layer.cut.score
        with np.errstate(divide="ignore"):
            grid[: layer.experts, column] = np.log2(scores / max(middle, 1e-300))
    return grid


def ranked(layers: Layers) -> np.ndarray:
    """`ratios` with each layer's experts sorted: kept experts first, each side by score."""
    grid = ratios(layers)
    for column, order in enumerate(_orders(layers)):
        grid[: len(order), column] = grid[order, column]
    return grid


def _orders(layers: Layers) -> list[np.ndarray]:
    by_score = [layer.scores.sort(descending=True, stable=True).indices for layer in layers]
    return [
        (order if layer.cut is None else layer.cut.order).numpy()
        for layer, order in zip(layers, by_score, strict=True)
    ]


def _reach(grid: np.ndarray) -> float:
    """Half the color scale, in powers of two, so that it holds 95 % of the values."""
    finite = np.abs(grid[np.isfinite(grid)])
    reach = float(np.quantile(finite, 0.95)) if len(finite) else 1.0
    return min(max(round(2 * reach) / 2, 0.5), 4.0)


def _draw_grid(axis: Any, grid: np.ndarray, reach: float) -> Any:
    shown = np.clip(grid, -reach, reach)  # NaN stays
    image = axis.imshow(
        shown,
        cmap=COLORS,
        norm=TwoSlopeNorm(0, -reach, reach),
        aspect="auto",
        interpolation="none",
    )
    axis.spines[:].set_visible(False)
    return image


def _ratio_bar(
    figure: Figure, image: Any, axis: Any, layers: Layers, reach: float, *, narrow: bool
) -> None:
    base = "cut" if layers[0].cut is not None else "layer's median"
    bar = color_bar(figure, image, axis, f"score ÷ {base}", narrow=narrow)
    powers = [p for p in (-4, -3, -2, -1, -0.5, 0, 0.5, 1, 2, 3, 4) if abs(p) <= reach]
    powers = [p for p in powers if p == int(p) or reach < 1.5]
    bar.set_ticks(powers, labels=[f"{2.0**p:.2g}" for p in powers])


def draw_cut(layers: Layers, near: str, *, narrow: bool) -> Figure:
    """Scores by rank; with a plan also its cut, the routing mass kept, and the experts near the
    cut, which `near` describes in words.
    """
    planned = layers[0].cut is not None
    most = max(layer.experts for layer in layers)
    tall = 3.4 if most <= 16 else 4.6
    heights = [tall, 1.15, 1.15] if planned else [tall]
    figure = new_figure(sum(heights) + 0.9 + (0.6 if narrow else 0), narrow=narrow)
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    written = most <= 32 and len(layers) <= (6 if narrow else _FEW_LAYERS)
    grid = ranked(layers)
    reach = _reach(grid)
    image = _draw_grid(axes[0], grid, reach)
    axes[0].set(ylabel="experts of a layer, best first", title="Scores, best expert at the top")
    _rank_ticks(axes[0], most)
    if planned:
        _draw_cut_line(axes[0], layers, named=not (written and narrow))
        _draw_retained(axes[1], layers)
        _draw_near(axes[2], layers, near)
    if written:
        _write_ids(axes[0], layers, grid, reach)
    layer_ticks(axes[-1], [layer.label for layer in layers], narrow=narrow)
    axes[-1].set_xlabel("MoE layer")
    _ratio_bar(figure, image, axes[0], layers, reach, narrow=narrow)
    return figure


def _rank_ticks(axis: Any, most: int) -> None:
    step = next(s for s in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if most / s <= 8)
    places = range(0, most + 1, step)
    axis.set_yticks([place - 0.5 for place in places], places)
    axis.set_ylim(most - 0.5, -0.5)


def _draw_cut_line(axis: Any, layers: Layers, *, named: bool) -> None:
    """The cut as a line, white on black so that it shows on every color; thin lines enclose the
    experts near it.
    """
    edges = np.arange(len(layers) + 1) - 0.5
    cuts = [layer.cut for layer in layers if layer.cut is not None]
    kept = np.array([float(cut.kept.sum()) for cut in cuts]) - 0.5
    outline = [withStroke(linewidth=3.4, foreground="black")]
    axis.stairs(kept, edges, baseline=None, color="white", linewidth=1.6, path_effects=outline)
    for sign, near in ((-1, [c.near_kept for c in cuts]), (1, [c.near_removed for c in cuts])):
        place = kept + sign * np.array(near)
        thin = [withStroke(linewidth=1.6, foreground="black")]
        axis.stairs(place, edges, baseline=None, color="white", linewidth=0.7, path_effects=thin)
    if not named:
        return
    style = {"color": "white", "fontsize": 8.5, "fontweight": "bold", "ha": "right"}
    halo = [withStroke(linewidth=2.4, foreground="black")]
    shift = 0.012 * axis.get_ylim()[0]
    axis.text(
        len(layers) - 0.6, kept[-1] - shift, "kept ↑", va="bottom", path_effects=halo, **style
    )
    axis.text(
        len(layers) - 0.6, kept[-1] + shift, "removed ↓", va="top", path_effects=halo, **style
    )


def _write_ids(axis: Any, layers: Layers, grid: np.ndarray, reach: float) -> None:
    for column, order in enumerate(_orders(layers)):
        for row, expert in enumerate(order):
            dark = grid[row, column] < 0.1 * reach
            axis.text(column, row, str(expert), ha="center", va="center", fontsize=6.5,
                      color="white" if dark else "black", in_layout=False)  # fmt: skip


def _draw_retained(axis: Any, layers: Layers) -> None:
    values = np.array([100 * layer.retained for layer in layers if layer.retained is not None])
    places = np.arange(len(layers))
    marker = "o" if len(layers) <= 40 else None
    axis.plot(places, values, color=SERIES[0], marker=marker, markersize=3, linewidth=1.5)
    worst = int(values.argmin())
    axis.plot([worst], [values[worst]], marker="v", color=SERIES[1], markersize=6)
    _name_point(
        axis,
        worst,
        len(layers),
        values[worst],
        f"{values[worst]:.0f} % in layer {layers[worst].label}",
    )
    axis.set_title("Routing mass kept, %")
    axis.set_ylim(min(50.0, 10 * np.floor(values.min() / 10) - 12), 100)
    axis.grid(axis="y")


def _name_point(axis: Any, place: int, number: int, value: float, text: str) -> None:
    left = place < number / 2
    axis.annotate(text, (place, value), xytext=(7 if left else -7, -3), textcoords="offset points",
                  ha="left" if left else "right", va="top", fontsize=8)  # fmt: skip


def _draw_near(axis: Any, layers: Layers, near: str) -> None:
    edges = np.arange(len(layers) + 1) - 0.5
    cuts = [layer.cut for layer in layers if layer.cut is not None]
    above = np.array([cut.near_kept for cut in cuts])
    below = np.array([cut.near_removed for cut in cuts])
    axis.stairs(above, edges, fill=True, color=SERIES[4], alpha=0.85)
    axis.stairs(-below, edges, fill=True, color=SERIES[0], alpha=0.85)
    axis.axhline(0, color=INK, linewidth=0.8)
    top = max(int(above.max()), int(below.max()), 1)
    axis.set_ylim(-1.15 * top, 1.15 * top)
    axis.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    axis.set_title(f"Experts {near}")
    for side, place in (("kept", "top"), ("removed", "bottom")):
        height = 0.97 if place == "top" else 0.03
        axis.text(
            0.005, height, side, transform=axis.transAxes, va=place, fontsize=8, in_layout=False
        )
    axis.grid(axis="y")


def draw_budget(layers: Layers, *, narrow: bool) -> Figure:
    """Experts kept and removed per layer, for plans that do not keep the same number everywhere."""
    figure = new_figure(2.4, narrow=narrow)
    axis = figure.subplots()
    edges = np.arange(len(layers) + 1) - 0.5
    experts = np.array([layer.experts for layer in layers])
    kept = np.array([int(layer.cut.kept.sum()) for layer in layers if layer.cut is not None])
    axis.stairs(experts, edges, fill=True, color=GRID, label="removed")
    axis.stairs(kept, edges, fill=True, color=SERIES[0], label="kept")
    mean = float(kept.mean())
    axis.axhline(mean, color=SERIES[1], linestyle=DASHES[1], label=f"mean kept: {mean:.4g}")
    axis.set(ylabel="experts", xlabel="MoE layer")
    axis.set_ylim(0, experts.max() * 1.02)
    layer_ticks(axis, [layer.label for layer in layers], narrow=narrow)
    figure.legend(loc="outside lower left", ncols=3)
    return figure


def draw_map(layers: Layers, *, narrow: bool) -> Figure:
    """Scores by expert id, which show patterns across layers; crosses mark removed experts."""
    most = max(layer.experts for layer in layers)
    figure = new_figure(3.2 if most <= 16 else 5.2, narrow=narrow)
    axis = figure.subplots()
    grid = ratios(layers)
    reach = _reach(grid)
    image = _draw_grid(axis, grid, reach)
    if most <= _FEW_EXPERTS and len(layers) <= _FEW_LAYERS:
        for column, layer in enumerate(layers):
            if layer.cut is not None:
                gone = (~layer.cut.kept).nonzero().flatten().tolist()
                # A stroke as path effect would write each cross out as paths of its own.
                for color, width in (("black", 2.2), ("white", 1.1)):
                    axis.plot([column] * len(gone), gone, "x", color=color, markersize=4,
                              markeredgewidth=width)  # fmt: skip
    _rank_ticks(axis, most)
    axis.set(ylabel="expert id", xlabel="MoE layer")
    layer_ticks(axis, [layer.label for layer in layers], narrow=narrow)
    _ratio_bar(figure, image, axis, layers, reach, narrow=narrow)
    return figure
