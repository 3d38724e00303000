"""The first screen of a report (what is kept, and where to look first), and the table of layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reap_driver.reporting.elements import Cell, Share, Summary, Table, Tile
from reap_driver.reporting.inputs import Inputs
from reap_driver.reporting.measures import LayerMeasures

_FIRST = 5  # layers in the table of the first screen


def summary(inputs: Inputs) -> Summary:
    """The first screen of a report."""
    layers = inputs.layers
    experts = sum(layer.experts for layer in layers)
    if inputs.plan is None:
        lead = (
            f"{experts:,} experts in {len(layers)} MoE layers, scored by "
            f"{inputs.scores.criterion}. No plan was given, so nothing is cut: make one with "
            "`reap-kernels plan` and pass it to `reap-kernels report` as well."
        )
        return Summary(lead, [_dead_tile(layers)], inputs.notes(), None)
    worst = min(layers, key=retained_of)
    near = sum(layer.cut.near for layer in layers if layer.cut is not None)
    kept = sum(int(layer.cut.kept.sum()) for layer in layers if layer.cut is not None)
    mean = float(np.mean([retained_of(layer) for layer in layers]))
    lead = (
        f"The plan keeps {kept_of(inputs)} and removes {Share(1 - kept / experts)} of all "
        f"experts. On average over layers, the kept experts carried {Share(mean)} of the routing "
        f"mass; least in layer {worst.label}, {Share(retained_of(worst))}."
    )
    tiles = [
        Tile(f"{kept:,}", f"of {experts:,} experts are kept", f"by {inputs.scores.criterion}"),
        Tile(str(Share(mean)), "of the routing mass is kept", _range_of_retained(layers)),
        Tile(f"{near:,}", f"experts {inputs.near}", f"{Share(near / experts)} of all"),
        _dead_tile(layers),
    ]
    first = sorted(layers, key=retained_of)[:_FIRST]
    caption = "Layers to look at first: least routing mass kept"
    return Summary(lead, tiles, inputs.notes(), layer_table(caption, first, inputs))


def retained_of(layer: LayerMeasures) -> float:
    """Share of the routing mass that the plan keeps in a layer."""
    assert layer.retained is not None
    return layer.retained


def kept_of(inputs: Inputs) -> str:
    """How many experts the plan keeps per layer, in words."""
    counts = [(int(la.cut.kept.sum()), la.experts) for la in inputs.layers if la.cut is not None]
    if len(set(counts)) == 1:
        return f"{counts[0][0]} of {counts[0][1]} experts in each of {len(counts)} layers"
    kept = [number for number, _ in counts]
    return f"between {min(kept)} and {max(kept)} experts in each of {len(counts)} layers"


def _range_of_retained(layers: Sequence[LayerMeasures]) -> str:
    worst, best = min(layers, key=retained_of), max(layers, key=retained_of)
    return f"{Share(retained_of(worst))} (layer {worst.label}) to {Share(retained_of(best))}"


def _dead_tile(layers: Sequence[LayerMeasures]) -> Tile:
    dead = sum(layer.dead for layer in layers)
    kept = sum(
        int((layer.cut.kept & (layer.count == 0)).sum())
        for layer in layers
        if layer.cut is not None
    )
    if not dead:
        more = "every expert received tokens"
    else:
        more = "received no token" + (
            f"; {kept:,} of them are kept" if layers[0].cut is not None else ""
        )
    return Tile(f"{dead:,}", "dead experts", more)


def layer_table(caption: str, layers: Sequence[LayerMeasures], inputs: Inputs) -> Table:
    """The numbers behind the pictures, a row per layer."""
    headings = ["layer"]
    if inputs.plan is not None:
        headings += ["kept of", "mass kept"]
        if len(inputs.stats.groups) > 1:
            headings += ["worst group", "its mass kept"]
        headings += ["near the cut" if inputs.doubt else "in the margin", "gap"]
    else:
        headings += ["experts"]
    headings += ["busiest / mean", "Gini", "dead"]
    return Table(caption, headings, [_layer_row(layer, inputs) for layer in layers])


def _layer_row(layer: LayerMeasures, inputs: Inputs) -> list[Cell]:
    row: list[Cell] = [layer.label]
    if layer.cut is None:
        row += [layer.experts]
    else:
        row += [f"{int(layer.cut.kept.sum())} of {layer.experts}", Share(retained_of(layer))]
        if len(inputs.stats.groups) > 1:
            worst = int(np.argmin(layer.retained_by_group))
            row += [inputs.stats.groups[worst], Share(layer.retained_by_group[worst])]
        row += [layer.cut.near, None if layer.cut.gap is None else Share(layer.cut.gap)]
    return [*row, layer.max_load, layer.gini, layer.dead]
