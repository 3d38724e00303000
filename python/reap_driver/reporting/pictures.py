"""The pictures of a report: what each shows, in words for those who do not see it, and its caption.

Importing this module imports matplotlib.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from reap_driver.planning.criteria import named
from reap_driver.reporting.draw_cut import draw_budget, draw_cut, draw_map
from reap_driver.reporting.draw_layers import colored_by_depth, draw_groups, draw_load, draw_margin
from reap_driver.reporting.elements import Share
from reap_driver.reporting.groups import threshold
from reap_driver.reporting.inputs import Inputs
from reap_driver.reporting.style import Picture
from reap_driver.reporting.summary import kept_of, retained_of


def of_sections(inputs: Inputs) -> dict[str, list[Picture]]:
    """Name of a section -> its pictures; none where there is nothing to show."""
    return {
        "cut": [_cut(inputs), _map(inputs), *_budget(inputs)],
        "margin": _margin(inputs),
        "groups": _groups(inputs),
        "load": [_load(inputs)],
    }


def _cut(inputs: Inputs) -> Picture:
    """Scores by rank, with the cut."""
    scale = "relative to the layer's median: bright is above it, dark is below"
    lines = ""
    if inputs.cutting is not None:
        scale = (
            "relative to the layer's cut, midway between the last kept and the first removed "
            "expert: bright is above the cut, dark is below, gray is close to it"
        )
        lines = _cut_lines(inputs)
    return Picture(
        name="cut",
        title="Where the cut is",
        text=_cut_text(inputs),
        caption=f"Score by {named(inputs.scores.criterion)}, {scale}.{lines}",
        draw=partial(draw_cut, inputs.layers, inputs.near),
    )


def _cut_lines(inputs: Inputs) -> str:
    """What the lines of the cut are."""
    return (
        f" The thick line is the cut; the thin lines enclose as many experts as are {inputs.near}; "
        "below, the kept ones of these are drawn upward and the removed ones downward."
    )


def _cut_text(inputs: Inputs) -> str:
    layers = inputs.layers
    if inputs.cutting is None:
        return f"Heat map of {len(layers)} layers: each layer's experts sorted by score."
    worst, best = min(layers, key=retained_of), max(layers, key=retained_of)
    near = [layer.cut.near for layer in layers if layer.cut is not None]
    return (
        f"Heat map of {len(layers)} layers, each layer's experts sorted by score, with the cut: "
        f"{kept_of(inputs)} are kept. Below, the routing mass kept, from "
        f"{Share(retained_of(worst))} in layer {worst.label} to {Share(retained_of(best))} in "
        f"layer {best.label}, and the experts {inputs.near}, {min(near)} to {max(near)} per layer. "
        "The table of all layers has the numbers."
    )


def _map(inputs: Inputs) -> Picture:
    """Scores by expert id."""
    return Picture(
        name="map",
        title="The same by expert id",
        text="Heat map of every expert's score by id and layer, colored as in the picture of the "
        "cut; patterns across neighboring ids or layers would show here.",
        caption="Rows or blocks of one color show routing groups, unused experts, or layers that "
        "share a pattern. Crosses mark the removed experts where there is room for them.",
        draw=partial(draw_map, inputs.layers),
    )


def _budget(inputs: Inputs) -> list[Picture]:
    """Experts kept per layer; nothing where all layers keep the same share."""
    if inputs.cutting is None or inputs.cutting.uniform:
        return []
    layers = inputs.layers
    kept = [int(layer.cut.kept.sum()) for layer in layers if layer.cut is not None]
    return [
        Picture(
            name="budget",
            title="Experts kept in each layer",
            text=f"Between {min(kept)} and {max(kept)} experts are kept, "
            f"{np.mean(kept):.4g} on average.",
            caption=f"Allocation: {inputs.cutting.allocation}. Most: layer "
            f"{layers[int(np.argmax(kept))].label}; fewest: layer "
            f"{layers[int(np.argmin(kept))].label}.",
            draw=partial(draw_budget, layers),
        )
    ]


def _margin(inputs: Inputs) -> list[Picture]:
    """How clear the decision is; nothing without a plan."""
    if inputs.cutting is None:
        return []
    gaps = [la.cut.gap for la in inputs.layers if la.cut is not None and la.cut.gap is not None]
    median = str(Share(np.median(gaps))) if gaps else "not defined"
    return [
        Picture(
            name="margin",
            title="How clear the decision is",
            text="Per layer, the scores of the lowest kept and of the highest removed expert, "
            f"relative to the cut. The median of the gap between them is {median}.",
            caption="Where the gap is small, another sample of the data might have kept the other "
            "expert. For a single expert this matters little; it matters more where many experts "
            "are near the cut. "
            + (inputs.doubt or "Bars or bands hold the true scores with a probability of 90 %."),
            draw=partial(draw_margin, inputs.layers, inputs.uncertainty),
        )
    ]


def _load(inputs: Inputs) -> Picture:
    """How the router used the experts."""
    layers = inputs.layers
    busiest = max(layers, key=lambda layer: layer.max_load)
    dead = max(layers, key=lambda layer: layer.dead)
    return Picture(
        name="load",
        title="How the router used the experts",
        text=f"Curves of the load, sorted. The busiest expert of all is in layer {busiest.label}, "
        f"with {busiest.max_load:.3g} times the mean load of its layer. Layer {dead.label} has the "
        f"most dead experts: {dead.dead} of {dead.experts}.",
        caption="Load is the number of tokens routed to an expert. Dead experts received no token "
        "of the calibration data. Removing them costs nothing on data of the same kind.",
        draw=partial(draw_load, layers),
        depth=len(layers) if colored_by_depth(layers) else 0,
    )


def _groups(inputs: Inputs) -> list[Picture]:
    """Which groups the experts serve; nothing with one group."""
    groups = inputs.stats.groups
    if len(groups) < 2:
        return []
    part = f"{100 * threshold(len(groups)):g} %"
    of_plan = "routing mass kept of each group, specialists removed, " if inputs.cutting else ""
    return [
        Picture(
            name="groups",
            title="Which groups the experts serve",
            text=f"Heat maps of calibration groups by layers: {of_plan}number of specialists. The "
            "tables below and the table of all layers have the numbers.",
            caption=f"An expert is a specialist of a group if at least {part} of its routing mass "
            "comes from that group, with all groups weighted equally. A dot: the group has no "
            "specialist there.",
            draw=partial(draw_groups, inputs.layers, groups),
        )
    ]
