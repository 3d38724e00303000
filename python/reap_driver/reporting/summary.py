"""The first screen of a report (what is kept, and where to look first), and the table of layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from reap_driver.base.units import in_bytes, short
from reap_driver.planning.plan import Plan
from reap_driver.planning.stability import CERTAIN
from reap_driver.reporting.elements import Cell, Share, Summary, Table, Term, Tile
from reap_driver.reporting.inputs import Inputs
from reap_driver.reporting.measures import NEAR, LayerMeasures
from reap_driver.reporting.sizes import sizes_of

_FIRST = 5  # layers in the table of the first screen


def summary(inputs: Inputs) -> Summary:
    """The first screen of a report."""
    layers = inputs.layers
    experts = sum(layer.experts for layer in layers)
    if inputs.cutting is None:
        lead = f"{experts:,} experts in {len(layers)} MoE layers, scored by "
        lead += f"{inputs.scores.criterion}. {_uncut(inputs)}"
        tiles = [*_neuron_tiles(inputs.plan), *_size_tiles(inputs), _dead_tile(layers)]
        return Summary(lead, tiles, [replace(_MASS, advice=""), _DEAD], inputs.notes(), None)
    worst = min(layers, key=retained_of)
    near = sum(layer.cut.near for layer in layers if layer.cut is not None)
    kept = sum(int(layer.cut.kept.sum()) for layer in layers if layer.cut is not None)
    mean = float(np.mean([retained_of(layer) for layer in layers]))
    lead = (
        f"The plan keeps {kept_of(inputs)} and removes {_removed(inputs, kept / experts)}. "
        f"On average over layers, the kept experts carried {Share(mean)} of the routing "
        "mass, which is the sum of the weights that the router gave to experts; least in layer "
        f"{worst.label}, {Share(retained_of(worst))}."
    )
    tiles = [
        Tile(f"{kept:,}", f"of {experts:,} experts are kept", f"by {inputs.scores.criterion}"),
        *_neuron_tiles(inputs.plan),
        *_size_tiles(inputs),
        Tile(str(Share(mean)), "of the routing mass is kept", _range_of_retained(layers)),
        Tile(f"{near:,}", f"experts {inputs.near}", _near_more(near / experts, inputs)),
        _dead_tile(layers),
    ]
    first = sorted(layers, key=retained_of)[:_FIRST]
    caption = "Layers to look at first: least routing mass kept"
    terms = [_MASS, _near_term(inputs), _DEAD]
    return Summary(lead, tiles, terms, inputs.notes(), layer_table(caption, first, inputs))


def _uncut(inputs: Inputs) -> str:
    """Why no expert is removed."""
    if inputs.plan is None:
        return (
            "No plan was given, so nothing is cut: make one with `reap-kernels plan` and pass it "
            "to `reap-kernels report` as well."
        )
    each = " or ".join(f"{b} of {a}" for a, b in sorted(set(inputs.plan.widths.values())))
    return f"The plan keeps all of them{f', with {each} neurons of each' if each else ''}."


def _removed(inputs: Inputs, kept: float) -> str:
    """What share of what the plan removes.

    Args:
        kept: share of the experts that stay.
    """
    assert inputs.plan is not None
    if not inputs.plan.narrows:
        return f"{Share(1 - kept)} of all experts"
    layers = inputs.plan.layers.values()
    stays = sum(len(la.kept) * (la.narrow_width or 0) for la in layers)
    before = sum(la.num_experts * (la.width or 0) for la in layers)
    return (
        f"{Share(1 - kept)} of all experts and {Share(1 - stays / before)} of all neurons, those "
        "of removed experts included"
    )


def _neuron_tiles(plan: Plan | None) -> list[Tile]:
    """Neurons of each kept expert, where a plan removes some."""
    return (
        []
        if plan is None
        else [
            Tile(
                f"{after}",
                f"of {before} neurons of each kept expert",
                "down projections solved again",
            )
            for before, after in sorted(set(plan.widths.values()))
        ]
    )


def _near_more(share: float, inputs: Inputs) -> str:
    """What the number of experts near the cut is, in words."""
    known = "" if inputs.doubt else "; another sample of the data may decide otherwise"
    return f"{Share(share)} of all{known}"


def _size_tiles(inputs: Inputs) -> list[Tile]:
    """Parameters and weights before and after, where they are known."""
    found = sizes_of(inputs)
    if found is None:
        return []
    before, after = (short(number, "kMBT") for number in found.parameters)
    tiles = [Tile(f"≈ {after}", "parameters", f"of {before} before")]
    if found.nbytes is not None:
        old, new = map(in_bytes, found.nbytes)
        tiles.append(Tile(f"≈ {new}", f"of weights in {found.dtype}", f"of {old} before"))
    return tiles


_MASS = Term(
    "Routing mass",
    "the sum, over all tokens of the calibration data, of the weights with which the router "
    "combines the outputs of the experts it chose.",
    "Without the removed experts, others are chosen in their place. Where a layer keeps little of "
    "the mass, let it lose fewer experts (layer ratios, or a lower ratio for all layers), and "
    "compare the pruned model with the original on text of your own.",
)
_DEAD = Term(
    "Dead experts",
    "those that no token of the calibration data was routed to.",
    "If there are many, the data may be too few or too narrow: they say nothing of these experts.",
)


def _near_term(inputs: Inputs) -> Term:
    """What is meant by experts near the cut, which is the decision margin where that is known."""
    if inputs.doubt:
        return Term(
            "Near the cut",
            f"experts whose score differs by less than {100 * NEAR:g} % from the cut, which lies "
            "midway between the last kept and the first removed expert.",
            "How sure these decisions are is not known here; see the note.",
        )
    return Term(
        "Decision margin",
        "the experts that another sample of the same data would keep with a probability between "
        f"{100 * (1 - CERTAIN):g} % and {100 * CERTAIN:g} %.",
        "If it holds many experts, observe more data of the same kind: intervals narrow with the "
        "square root of the tokens. If it stays large, the experts in it score alike, and it "
        "matters little which of them stay.",
    )


def retained_of(layer: LayerMeasures) -> float:
    """Share of the routing mass that the plan keeps in a layer."""
    assert layer.retained is not None
    return layer.retained


def kept_of(inputs: Inputs) -> str:
    """How many experts the plan keeps per layer, in words."""
    counts = [(int(la.cut.kept.sum()), la.experts) for la in inputs.layers if la.cut is not None]
    if len(set(counts)) == 1:
        text = f"{counts[0][0]} of {counts[0][1]} experts in each of {len(counts)} layers"
    else:
        kept = [number for number, _ in counts]
        text = f"between {min(kept)} and {max(kept)} experts in each of {len(counts)} layers"
    widths = set(inputs.plan.widths.values()) if inputs.plan is not None else set()
    each = " or ".join(f"{after} of {before}" for before, after in sorted(widths))
    return f"{text} ({each} neurons of each)" if each else text


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


def layer_table(
    caption: str, layers: Sequence[LayerMeasures], inputs: Inputs, *, stacked: bool = True
) -> Table:
    """The numbers behind the pictures, a row per layer."""
    headings = ["layer"]
    if inputs.cutting is not None:
        neurons = ["neurons"] if inputs.cutting.narrows else []
        headings += ["kept of", *neurons, "mass kept"]
        if len(inputs.stats.groups) > 1:
            headings += ["worst group", "its mass kept"]
        headings += ["near the cut" if inputs.doubt else "in the decision margin", "gap"]
    else:
        headings += ["experts"]
    headings += ["busiest / mean", "Gini", "dead"]
    return Table(caption, headings, [_layer_row(layer, inputs) for layer in layers], stacked)


def _layer_row(layer: LayerMeasures, inputs: Inputs) -> list[Cell]:
    row: list[Cell] = [layer.label]
    if layer.cut is None:
        row += [layer.experts]
    else:
        row += [f"{int(layer.cut.kept.sum())} of {layer.experts}"]
        if inputs.plan is not None and inputs.plan.narrows:
            widths = inputs.plan.widths.get(layer.name)
            row += [None if widths is None else f"{widths[1]} of {widths[0]}"]
        row += [Share(retained_of(layer))]
        if len(inputs.stats.groups) > 1:
            worst = int(np.argmin(layer.retained_by_group))
            row += [inputs.stats.groups[worst], Share(layer.retained_by_group[worst])]
        row += [layer.cut.near, None if layer.cut.gap is None else Share(layer.cut.gap)]
    return [*row, layer.max_load, layer.gini, layer.dead]
