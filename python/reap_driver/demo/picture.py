"""Draws the demo's picture: every expert's score, and which experts each plan keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

Kept = Mapping[str, Sequence[int]]


def draw_scores(
    panels: Mapping[str, tuple[Mapping[str, Tensor], Kept, Kept]], path: Path, title: str
) -> None:
    """Saves one picture with a heat map of layers by experts per criterion.

    Scores are shown relative to the best score of their layer, because plans compare experts only
    within a layer.

    Args:
        panels: title -> (layer -> scores [E], layer -> ids kept by the lighter plan, layer -> ids
            kept by the heavier plan). The heavier plan keeps a subset of what the lighter keeps.
        path: PNG file to write.
        title: title of the picture.
    """
    # Without pyplot, a figure needs no display and changes no global state.
    figure = Figure(figsize=(11, 1.1 + 2.3 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)
    for axis, (name, (scores, light, heavy)) in zip(axes[:, 0], panels.items(), strict=True):
        relative = torch.stack([s / s.max() for s in scores.values()])
        # cividis: its lightness increases steadily, also for color-blind readers and in gray print
        image = axis.imshow(relative.numpy(), cmap="cividis", vmin=0, vmax=1, aspect="auto")
        _mark(axis, list(scores), light, heavy)
        axis.set(title=name, ylabel="MoE layer", xlabel="expert")
        axis.set_yticks(range(len(scores)), range(len(scores)))
        axis.set_xticks(range(0, relative.shape[1], 4))
        figure.colorbar(image, ax=axis, label="score / layer's best", pad=0.01)
    figure.suptitle(title)
    figure.legend(handles=_legend(), loc="outside lower center", ncols=3, frameon=False)
    figure.set_dpi(130)
    FigureCanvasAgg(figure).print_png(path)  # `savefig` would draw everything twice


# A filled and a hollow shape can be told apart without color. Experts that only the heavier plan
# removes score low, so the white hollow mark lies on dark cells.
_KEPT = {"marker": "o", "s": 42, "facecolor": "white", "edgecolor": "black", "linewidth": 1.2}
_LIGHT_ONLY = {"marker": "s", "s": 26, "facecolor": "none", "edgecolor": "white", "linewidth": 1.4}


def _mark(axis: Any, layers: Sequence[str], light: Kept, heavy: Kept) -> None:
    for row, layer in enumerate(layers):
        only_light = sorted(set(light[layer]) - set(heavy[layer]))
        axis.scatter(only_light, [row] * len(only_light), **_LIGHT_ONLY)
        axis.scatter(heavy[layer], [row] * len(heavy[layer]), **_KEPT)


def _legend() -> list[Line2D]:
    def mark(label: str, shape: str) -> Line2D:
        return Line2D([], [], marker=shape, linestyle="", label=label, markersize=7,
                      markerfacecolor="white", markeredgecolor="black")  # fmt: skip

    return [
        mark("kept by both plans", "o"),
        mark("removed by the heavier plan only", "s"),
        Line2D([], [], linestyle="", label="no mark: removed by both"),
    ]
