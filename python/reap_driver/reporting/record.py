"""Tables of a report: groups against each other, and the record of where numbers come from."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from reap_driver.plan.criteria import named
from reap_driver.plan.published import calibration_mix, gate_rule
from reap_driver.plan.scoring import score
from reap_driver.plan.stability import rank_correlation
from reap_driver.reporting import html
from reap_driver.reporting.html import Share
from reap_driver.reporting.inputs import Inputs
from reap_driver.reporting.specialists import most_specialised, reweighted

_EACH = 3  # specialists shown of each group


def group_tables(inputs: Inputs) -> str:
    """Specialists, correlation of scores between groups, and what other weights would keep."""
    groups = inputs.stats.groups
    if len(groups) < 2:
        return html.paragraph(
            f"All data are one group ({groups[0]}). Give sources names of their own (--data "
            "GROUP=SOURCE) when observing to see which experts serve which."
        )
    return _specialists(inputs) + _correlations(inputs) + _reweighted(inputs)


def _specialists(inputs: Inputs) -> str:
    found = most_specialised(inputs.layers, inputs.stats.groups, _EACH)
    if not found:
        return html.paragraph("No expert is a specialist of one group.")
    headings = ["group", "layer", "expert", "work for it", "of its mass", "rows"]
    rows: list[list[html.Cell]] = [
        [one.group, one.layer, one.expert, Share(one.part), Share(one.share), one.rows]
        for one in found
    ]
    if inputs.plan is not None:
        headings.append("plan")
        rows = [
            [*row, "kept" if one.kept else "removed"] for row, one in zip(rows, found, strict=True)
        ]
    caption = f"Specialists that carry most of their group's routing mass, up to {_EACH} a group"
    return html.table(caption, headings, rows)


def _correlations(inputs: Inputs) -> str:
    scores = inputs.single_groups
    if not scores:
        return html.paragraph(
            "Some group did not reach every layer, so groups cannot be scored alone; observe more "
            "of its data to compare them."
        )
    means: dict[frozenset[str], float] = {}
    for one, other in itertools.combinations(scores, 2):
        by_layer = rank_correlation(scores[one], scores[other])
        means[frozenset((one, other))] = sum(by_layer.values()) / len(by_layer)
    rows: list[list[html.Cell]] = [
        [one, *(1.0 if one == other else means[frozenset((one, other))] for other in scores)]
        for one in scores
    ]
    caption = "Rank correlation of scores between groups, mean over layers (1: the same order)"
    return html.table(caption, ["group", *scores], rows)


def _reweighted(inputs: Inputs) -> str:
    if inputs.plan is None or not inputs.single_groups:
        return ""
    weightings = {f"{group} alone": scores for group, scores in inputs.single_groups.items()}
    alike = dict.fromkeys(inputs.stats.groups, 1.0)
    weightings["all groups alike"] = score(inputs.stats, inputs.scores.criterion, alike)
    rows: list[list[html.Cell]] = [
        [
            one.name,
            one.changed,
            Share(one.changed / one.kept),
            one.worst,
            Share(one.worst_share),
        ]
        for one in reweighted(inputs.layers, weightings)
    ]
    caption = "What would change in the kept set if groups had other weights (as many experts kept)"
    headings = ["weights", "experts exchanged", "of those kept", "most in layer", "there"]
    return html.table(caption, headings, rows)


def calibration(inputs: Inputs) -> str:
    """The mix of calibration data."""
    mix = calibration_mix(inputs.stats.provenance.get("data") or [])
    if not mix:
        return html.paragraph("The statistics do not say which data they were made from.")
    headings = ["group", "source", "records", "tokens", "share of tokens", "sequence length"]
    rows: list[list[html.Cell]] = [
        [
            entry.group,
            entry.source,
            entry.records,
            entry.tokens,
            None if entry.share is None else Share(entry.share),
            entry.seq_len,
        ]
        for entry in mix
    ]
    return html.table("Calibration mix", headings, rows)


def record(inputs: Inputs) -> str:
    """Model, method, software: everything the files say of themselves."""
    known = inputs.stats.provenance
    model = known.get("model") or {}
    plan, criterion = inputs.plan, inputs.scores.criterion
    pairs = [
        ("Model", inputs.model),
        ("Architecture", str(model.get("architecture") or "not recorded")),
        ("Criterion", named(criterion)),
        ("Gate weights g", gate_rule(known)),
    ]
    if plan is not None:
        weights = "as observed" if plan.weights is None else _weights(plan.weights)
        pairs += [
            ("Ratio asked", f"{plan.ratio:g}"),
            ("Allocation", plan.allocation),
            ("Group weights", weights),
        ]
        if inputs.protected:
            pairs.append(("Protected experts", f"{inputs.protected:,}"))
        pairs.append(("Scores of the plan", plan.scores_digest))
    software = known.get("software") or {}
    pairs += [
        ("Observed", str(known.get("created") or "not recorded")),
        ("Software", ", ".join(f"{k} {v}" for k, v in software.items()) or "not recorded"),
        ("Backend", str(known.get("backend") or "not recorded")),
        ("Digest of the model's config", str(model.get("config_digest") or "not recorded")),
    ]
    return html.facts(pairs)


def _weights(weights: Mapping[str, float]) -> str:
    return ", ".join(f"{group} {weight:g}" for group, weight in weights.items())
