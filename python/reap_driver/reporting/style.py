"""How pictures look: one palette for light and dark pages, and figures as SVG or PNG.

Figures are drawn without pyplot, so they need no display and change no global state. The page
embeds them as SVG whose text and lines take the page's colors; PNG files have a white background.
Equal figures give equal bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap, ListedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

# Colors that are drawn; the page replaces them by its own, for its light and its dark theme.
INK, MUTED, GRID = "#1f2430", "#5b6372", "#d3d8e0"
# The palette of Okabe and Ito, which color-blind readers can tell apart; lines differ in their
# dashes as well.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#b05b8f", "#8a6d00", "#3d8fbf")
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (8, 3)))
_ON_PAGE = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    **{color: f"var(--series-{number})" for number, color in enumerate(SERIES)},
}
# Its lightness increases steadily, also for color-blind readers and in gray print.
COLORS = "cividis"
# Of lines, one for each of many layers: a map with more hues, of which color-blind readers see the
# lightness too. Each theme has the part of it with a contrast of at least 3:1 to its background.
_DEPTH, _DEPTH_ON_LIGHT, _DEPTH_ON_DARK = "plasma", (0.0, 0.64), (0.4, 1.0)

WIDE, NARROW = 9.6, 3.75  # inches
_TITLE = 0.3  # inches that the title of a PNG file adds to the height
_STYLE = {
    "font.family": "sans-serif",
    # DejaVu Sans comes with matplotlib. Verdana is as wide, for browsers that lack it.
    "font.sans-serif": ["DejaVu Sans", "Verdana"],
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.linewidth": 0.7,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.parse_math": False,  # names of groups may contain dollar signs
    "svg.fonttype": "none",
    "svg.hashsalt": "reap",
    "svg.image_inline": True,
}


@dataclass(frozen=True)
class Picture:
    """A figure of the report.

    Attributes:
        name: name of its file, without the extension.
        title: title above it.
        text: what it shows, for readers who do not see it.
        caption: how to read it.
        draw: makes the figure; `narrow=True` for a phone.
        depth: number of layers that have a color each, by `depth_colors`; 0 if none has.
    """

    name: str
    title: str
    text: str
    caption: str
    draw: Callable[..., Figure]
    depth: int = 0

    def render(self, model: str) -> Rendered:
        """Draws the figure in all its forms; `model` is named in the title of the PNG file."""
        with _drawing():
            wide = self.draw(narrow=False)
            on_page = self._svg(wide, "wide")
            on_phone = self._svg(self.draw(narrow=True), "narrow")
            png = _titled(wide, f"{model}: {self.title}")
        return Rendered(self, on_page, on_phone, png)

    def _svg(self, figure: Figure, form: str) -> str:
        """An `<svg>` element for the page, with ids that no other picture uses."""
        buffer = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        # `savefig` would draw a figure twice, the first time only to lay it out.
        FigureCanvasSVG(figure).print_svg(buffer, metadata=metadata)
        text = buffer.getvalue()
        text = text[text.index("<svg") :]
        prefix = f"{self.name}-{form}-"
        used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
        text = re.sub(
            r' id="([^"]*)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in used else "", text
        )
        text = re.sub(r'href="#', f'href="#{prefix}', text)
        text = re.sub(r"url\(#", f"url(#{prefix}", text)
        themes = (depth_colors(self.depth, dark=dark) for dark in (False, True))
        for drawn, dark in zip(*themes, strict=True):
            # The first is for browsers that do not know the second.
            themed = rf"\1: {drawn}; \1: light-dark({drawn}, {dark})"
            text = re.sub(f"(stroke|fill): {drawn}", themed, text)
        for drawn, css in _ON_PAGE.items():
            text = text.replace(drawn, css)
        return re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)


@dataclass(frozen=True)
class Rendered:
    """A picture as it is written.

    Attributes:
        picture: what was drawn.
        wide: an `<svg>` element for the page.
        narrow: the same for a phone.
        png: a PNG file with a white background, 150 dots per inch.
    """

    picture: Picture
    wide: str
    narrow: str
    png: bytes


@contextmanager
def _drawing() -> Iterator[None]:
    with matplotlib.rc_context(_STYLE):
        yield


def _titled(figure: Figure, title: str) -> bytes:
    """A PNG file of a figure that was drawn, with a title above it; the layout stays."""
    width, height = figure.get_size_inches()
    figure.set_layout_engine(None)
    figure.suptitle(title, x=0.01, y=1 + 0.06 / height, ha="left", va="bottom", fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(
        buffer,
        format="png",
        dpi=150,
        facecolor="white",
        bbox_inches=Bbox.from_bounds(0, 0, width, height + _TITLE),
        metadata={"Software": None},
    )
    return buffer.getvalue()


def new_figure(height: float, *, narrow: bool) -> Figure:
    """An empty figure of the page's width, `height` inches high."""
    return Figure(figsize=(NARROW if narrow else WIDE, height), layout="constrained")


def depth_colors(number: int, *, dark: bool = False) -> list[str]:
    """As many different colors, in an order that can be seen, for a light or a dark background."""
    first, last = _DEPTH_ON_DARK if dark else _DEPTH_ON_LIGHT
    known: Any = matplotlib.colormaps[_DEPTH]
    smooth = LinearSegmentedColormap.from_list(_DEPTH, known.colors, N=1 << 14)
    return [to_hex(color) for color in smooth(np.linspace(first, last, number))]


def layer_ticks(axis: Any, labels: list[str], *, narrow: bool) -> None:
    """Labels layers along x, as many as there is room for."""
    places = _some(len(labels), 8 if narrow else 24)
    axis.set_xticks(places, [labels[place] for place in places])
    axis.set_xlim(-0.5, len(labels) - 0.5)


def _some(number: int, room: int) -> range:
    """Every nth of `number` places, as many as there is room for."""
    steps = (1, 2, 3, 4, 5, 6, 8, 10, 12, 20, 50, 100, 1000)
    return range(0, number, next(step for step in steps if number / step <= room))


def depth_bar(figure: Figure, axis: Any, labels: list[str], *, narrow: bool) -> None:
    """A color bar with the color of every layer."""
    number = len(labels)
    colors = ListedColormap(depth_colors(number))
    cells = ScalarMappable(BoundaryNorm(np.arange(number + 1) - 0.5, number), colors)
    bar = figure.colorbar(
        cells,
        ax=axis,
        label="MoE layer",
        location="bottom" if narrow else "right",
        aspect=40 if narrow else 20,
        pad=0.02,
    )
    places = _some(number, 8 if narrow else 12)
    bar.set_ticks(list(places), labels=[labels[place] for place in places])
    bar.minorticks_off()
    bar.outline.set_visible(False)


def color_bar(figure: Figure, image: Any, axes: Any, label: str, *, narrow: bool) -> Any:
    """A color bar: beside the axes on wide pages, below them on narrow ones."""
    bar = figure.colorbar(
        image,
        ax=axes,
        label=label,
        location="bottom" if narrow else "right",
        aspect=40 if narrow else 30,
        pad=0.01,
    )
    cells: Any = bar.solids
    cells.set_rasterized(True)  # as an image; otherwise it is 256 paths
    bar.outline.set_visible(False)
    return bar
