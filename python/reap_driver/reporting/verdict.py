"""The first screen of a report: what is kept, what that carries, where to look; and the table of
layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reap_driver.reporting import html
from reap_driver.reporting.html import Share
from reap_driver.reporting.inputs import Inputs
from reap_driver.reporting.measures import LayerMeasures

_FIRST = 5  # layers a reader is pointed to


def verdict(inputs: Inputs) -> str:
    """The first screen: what is kept, what that carries, where to look."""
    layers = inputs.layers
    experts = sum(layer.experts for layer in layers)
    dead = sum(layer.dead for layer in layers)
    if inputs.plan is None:
        lead = (
            f"{experts:,} experts in {len(layers)} MoE layers, scored by "
            f"{inputs.scores.criterion}. No plan was given, so nothing is cut: make one with "
            "`reap-kernels plan` and give it to `reap-kernels report` too."
        )
        tiles = [_dead_tile(layers, dead)]
        return f'<p class="lead">{html.escape(lead)}</p>\n' + html.tiles(tiles) + _notes(inputs)
    worst = min(layers, key=retained_of)
    near = sum(layer.cut.near for layer in layers if layer.cut is not None)
    kept = sum(int(layer.cut.kept.sum()) for layer in layers if layer.cut is not None)
    mean = float(np.mean([retained_of(layer) for layer in layers]))
    lead = (
        f"The plan keeps {kept_of(inputs)} and removes {Share(1 - kept / experts)} of all "
        f"experts. Those it keeps carried {Share(mean)} of the routing mass; least in layer "
        f"{worst.label}, {Share(retained_of(worst))}."
    )
    tiles = [
        (f"{kept:,}", f"of {experts:,} experts stay", f"by {inputs.scores.criterion}"),
        (str(Share(mean)), "of the routing mass stays", _worst_text(layers)),
        (
            f"{near:,}",
            f"experts {inputs.near}",
            f"{Share(near / experts)} of all",
        ),
        _dead_tile(layers, dead),
    ]
    first = sorted(layers, key=retained_of)[:_FIRST]
    return (
        f'<p class="lead">{html.escape(lead)}</p>\n'
        + html.tiles(tiles)
        + _notes(inputs)
        + layer_table("Layers to look at first: least routing mass kept", first, inputs)
    )


def _notes(inputs: Inputs) -> str:
    return "".join(f'<p class="note">{html.escape(note)}</p>\n' for note in inputs.notes())


def retained_of(layer: LayerMeasures) -> float:
    assert layer.retained is not None
    return layer.retained


def _worst_text(layers: Sequence[LayerMeasures]) -> str:
    worst, best = min(layers, key=retained_of), max(layers, key=retained_of)
    return f"{Share(retained_of(worst))} (layer {worst.label}) to {Share(retained_of(best))}"


def _dead_tile(layers: Sequence[LayerMeasures], dead: int) -> tuple[str, str, str]:
    kept = sum(
        int((layer.cut.kept & (layer.count == 0)).sum())
        for layer in layers
        if layer.cut is not None
    )
    if not dead:
        more = "every expert got tokens"
    else:
        more = "no token came" + (f"; {kept:,} of them stay" if layers[0].cut is not None else "")
    return f"{dead:,}", "dead experts", more


def kept_of(inputs: Inputs) -> str:
    """How many experts a layer keeps, in words."""
    counts = [(int(la.cut.kept.sum()), la.experts) for la in inputs.layers if la.cut is not None]
    if len(set(counts)) == 1:
        return f"{counts[0][0]} of {counts[0][1]} experts in each of {len(counts)} layers"
    kept = [number for number, _ in counts]
    return f"between {min(kept)} and {max(kept)} experts in each of {len(counts)} layers"


def layer_table(caption: str, layers: Sequence[LayerMeasures], inputs: Inputs) -> str:
    """The numbers behind the pictures."""
    headings = ["layer"]
    if inputs.plan is not None:
        headings += ["kept of", "mass kept"]
        if len(inputs.stats.groups) > 1:
            headings += ["worst group", "its mass kept"]
        headings += ["near the cut" if inputs.doubt else "in the margin", "gap"]
    else:
        headings += ["experts"]
    headings += ["busiest / mean", "Gini", "dead"]
    return html.table(caption, headings, [_layer_row(layer, inputs) for layer in layers])


def _layer_row(layer: LayerMeasures, inputs: Inputs) -> list[html.Cell]:
    row: list[html.Cell] = [layer.label]
    if layer.cut is None:
        row += [layer.experts]
    else:
        row += [f"{int(layer.cut.kept.sum())} of {layer.experts}", Share(retained_of(layer))]
        if len(inputs.stats.groups) > 1:
            worst = int(np.argmin(layer.retained_by_group))
            row += [inputs.stats.groups[worst], Share(layer.retained_by_group[worst])]
        row += [layer.cut.near, None if layer.cut.gap is None else Share(layer.cut.gap)]
    return [*row, layer.max_load, layer.gini, layer.dead]
