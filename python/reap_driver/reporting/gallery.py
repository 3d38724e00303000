"""The pictures of a report, with the words that go with them."""

from __future__ import annotations

from functools import partial

import numpy as np

from reap_driver.plan.criteria import named
from reap_driver.plan.stability import CERTAIN
from reap_driver.reporting.cut import draw_budget, draw_cut, draw_map
from reap_driver.reporting.groups import draw_groups
from reap_driver.reporting.html import Share
from reap_driver.reporting.inputs import Inputs
from reap_driver.reporting.load_picture import draw_load
from reap_driver.reporting.margin import draw_margin
from reap_driver.reporting.specialists import threshold
from reap_driver.reporting.style import Picture
from reap_driver.reporting.verdict import kept_of, retained_of


def cut_pictures(inputs: Inputs) -> list[Picture]:
    """Scores with the cut, by rank and by id, the budget where it differs, and the margin."""
    layers = inputs.layers
    scale = (
        "relative to the layer's cut, midway between the last expert that stays and the first that "
        "goes: bright is above it, dark below, grey close to it"
        if inputs.plan is not None
        else "relative to the layer's median: bright is above it, dark below"
    )
    found = [
        Picture(
            name="cut",
            title="Where the cut is",
            text=_cut_text(inputs),
            caption=f"Score by {named(inputs.scores.criterion)}, {scale}."
            + (_cut_words(inputs) if inputs.plan is not None else ""),
            draw=partial(draw_cut, layers, inputs.near),
        ),
        Picture(
            name="map",
            title="The same by expert id",
            text="Heat map of every expert's score by id and layer, coloured as in the picture of "
            "the cut; patterns across neighbouring ids or layers would show here.",
            caption="Rows or blocks of one colour show routing groups, unused experts, or layers "
            "that share a pattern; crosses mark what goes, where there is room for them.",
            draw=partial(draw_map, layers),
        ),
    ]
    if inputs.plan is not None and not inputs.plan.uniform:
        kept = [int(layer.cut.kept.sum()) for layer in layers if layer.cut is not None]
        found.append(
            Picture(
                name="budget",
                title="Experts kept in each layer",
                text=f"Between {min(kept)} and {max(kept)} experts are kept, "
                f"{np.mean(kept):.4g} on average.",
                caption=f"Allocation: {inputs.plan.allocation}. Most: layer "
                f"{layers[int(np.argmax(kept))].label}; fewest: layer "
                f"{layers[int(np.argmin(kept))].label}.",
                draw=partial(draw_budget, layers),
            )
        )
    return found


def _cut_words(inputs: Inputs) -> str:
    """What the lines of the cut are."""
    margin = (
        ""
        if inputs.doubt
        else " Inside the decision margin are experts that other data of this kind would have kept "
        f"with a probability between {100 * (1 - CERTAIN):g} % and {100 * CERTAIN:g} %."
    )
    return (
        f" The thick line is the cut; the thin ones enclose as many experts as are {inputs.near}."
        f"{margin} Routing mass is the sum of the gate weights."
    )


def _cut_text(inputs: Inputs) -> str:
    layers = inputs.layers
    if inputs.plan is None:
        return f"Heat map of {len(layers)} layers: each layer's experts sorted by score."
    worst, best = min(layers, key=retained_of), max(layers, key=retained_of)
    near = [layer.cut.near for layer in layers if layer.cut is not None]
    return (
        f"Heat map of {len(layers)} layers, each layer's experts sorted by score, with the cut: "
        f"{kept_of(inputs)} stay. Below, the routing mass kept, from {Share(retained_of(worst))} "
        f"in layer {worst.label} to {Share(retained_of(best))} in layer {best.label}, and the "
        f"experts {inputs.near}, {min(near)} to {max(near)} in a layer. The "
        "table of all layers has the numbers."
    )


def margin_pictures(inputs: Inputs) -> list[Picture]:
    """How clear the decision is; nothing without a plan."""
    if inputs.plan is None:
        return []
    gaps = [la.cut.gap for la in inputs.layers if la.cut is not None and la.cut.gap is not None]
    median = str(Share(np.median(gaps))) if gaps else "not defined"
    return [
        Picture(
            name="margin",
            title="How clear the decision is",
            text="Per layer, the scores of the lowest kept and of the highest removed expert, "
            f"relative to the cut. The median of the gap between them is {median}.",
            caption="Where the gap is small, another sample of the data could have kept the other "
            "expert. That matters little for one expert, and more where many are near the cut. "
            + (inputs.doubt or "Bars or bands hold the true scores with a probability of 90 %."),
            draw=partial(draw_margin, inputs.layers, inputs.uncertainty),
        )
    ]


def load_pictures(inputs: Inputs) -> list[Picture]:
    """How the router used the experts."""
    layers = inputs.layers
    busiest = max(layers, key=lambda layer: layer.max_load)
    dead = max(layers, key=lambda layer: layer.dead)
    return [
        Picture(
            name="load",
            title="How the router used the experts",
            text=f"Curves of the load, sorted. The busiest expert of all is in layer "
            f"{busiest.label}, with {busiest.max_load:.3g} times the mean load of its layer. Layer "
            f"{dead.label} has most dead experts: {dead.dead} of {dead.experts}.",
            caption="Load is the number of tokens routed to an expert. Dead experts got none of "
            "the calibration data: they are free to remove if the data are what you will serve.",
            draw=partial(draw_load, layers),
        )
    ]


def group_pictures(inputs: Inputs) -> list[Picture]:
    """Which groups the experts serve; nothing with one group."""
    groups = inputs.stats.groups
    if len(groups) < 2:
        return []
    part = f"{100 * threshold(len(groups)):g} %"
    return [
        Picture(
            name="groups",
            title="Whom the experts serve",
            text="Heat maps of calibration groups by layers: "
            + ("routing mass kept of each group, specialists that go, " if inputs.plan else "")
            + "number of specialists. The tables below and of all layers have the numbers.",
            caption=f"A specialist of a group does at least {part} of its work for it, by "
            "routing mass and groups counted alike. A dot: the group has no specialist there.",
            draw=partial(draw_groups, inputs.layers, groups),
        )
    ]
