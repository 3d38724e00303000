"""Colors of layers: as many as layers, in both themes, and visible on the page."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib.colors import to_rgb

from reap_driver.reporting.draw_layers import colored_by_depth, draw_load
from reap_driver.reporting.inputs import Inputs
from reap_driver.reporting.pictures import of_sections
from reap_driver.reporting.style import depth_colors
from tests.driver.reporting.conftest import Make, large

STYLE = Path(__file__).parents[3] / "python/reap_driver/reporting/templates/style.css"


def luminance(color: str) -> float:
    """Relative luminance, as WCAG 2 defines it."""
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))


@pytest.mark.parametrize("dark", [False, True])
def test_colors_differ_and_stand_out_from_the_page(dark: bool) -> None:
    background = luminance(re.findall(r"--page: (#\w+)", STYLE.read_text())[dark])
    for number in (7, 48, 94, 200):
        colors = depth_colors(number, dark=dark)
        assert len(set(colors)) == number
        light = [luminance(color) for color in colors]
        # Their order can be seen without hues too, but for the rounding of colors.
        assert all(after > before - 0.001 for before, after in pairwise(light))
        for one in light:
            high, low = max(one, background), min(one, background)
            assert (high + 0.05) / (low + 0.05) >= 3


def test_every_layer_has_a_curve_of_its_own_color(make: Make) -> None:
    layers = Inputs.checked(large(40, 16, ["a"]), None, None).layers
    assert colored_by_depth(layers)
    figure = draw_load(layers, narrow=False)
    curves, bar = figure.axes[0], figure.axes[-1]
    colors = [line.get_color() for line in curves.lines[:40]]
    assert len(set(colors)) == len(layers) == 40
    assert bar.get_ylabel() == "MoE layer"
    few = Inputs.checked(make()[0], None, None).layers
    assert not colored_by_depth(few)
    lines = draw_load(few, narrow=False).axes[0].lines[: len(few)]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(few)


def test_the_page_has_both_themes_of_every_color() -> None:
    inputs = Inputs.checked(large(9, 16, ["a"]), None, None)
    [load] = of_sections(inputs)["load"]
    drawn = load.render("a model").wide
    for light, dark in zip(depth_colors(9), depth_colors(9, dark=True), strict=True):
        assert f"stroke: {light}; stroke: light-dark({light}, {dark})" in drawn
        assert f"fill: {light}; fill: light-dark({light}, {dark})" in drawn
