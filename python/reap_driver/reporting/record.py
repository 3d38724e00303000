"""Where the numbers of a report come from: calibration data, model, method and software."""

from __future__ import annotations

from collections.abc import Mapping

from reap_driver.planning.criteria import named
from reap_driver.planning.public_provenance import (
    calibration_mix,
    live_mode,
    observation,
    router_weight_rule,
    shape_settings,
)
from reap_driver.reporting.elements import Cell, Fact, Facts, Paragraph, Share, Table
from reap_driver.reporting.inputs import Inputs

_DIGITS = len("sha256:") + 8  # of a digest, which tell two apart


def calibration(inputs: Inputs) -> Table | Paragraph:
    """The mix of calibration data."""
    mix = calibration_mix(inputs.stats.provenance.get("data") or [])
    if not mix:
        return Paragraph("The statistics do not record which data they were made from.")
    headings = ["group", "source", "records", "tokens", "share of tokens", "sequence length"]
    rows: list[list[Cell]] = [
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
    # What no source records, as records and sequences of live traffic, gets no column.
    recorded = [number for number in range(len(headings)) if any(row[number] for row in rows)]
    shown: list[list[Cell]] = [[row[number] for number in recorded] for row in rows]
    return Table("Calibration mix", [headings[number] for number in recorded], shown)


def method(inputs: Inputs) -> Facts:
    """Model, method and software, as the files record them."""
    known = inputs.stats.provenance
    model = known.get("model") or {}
    software = known.get("software") or {}
    return Facts(
        [
            Fact("Model", inputs.model),
            Fact("Architecture", _recorded(model.get("architecture"))),
            Fact("Criterion", named(inputs.scores.criterion)),
            Fact("Router weights g", router_weight_rule(known)),
            *_of_plan(inputs),
            *([Fact("Counted from", live)] if (live := live_mode(known)) else []),
            Fact("Observed", _recorded(known.get("created"))),
            *(
                Fact(name.capitalize(), value)
                for name, value in observation(known.get("observed") or {}).items()
            ),
            Fact("Software", _recorded(", ".join(f"{k} {v}" for k, v in software.items()))),
            Fact("Backend", _recorded(known.get("backend"))),
            _digest("Digest of the model's config", _recorded(model.get("config_digest"))),
        ]
    )


def _of_plan(inputs: Inputs) -> list[Fact]:
    """What the plan records; nothing without one."""
    plan = inputs.plan
    if plan is None:
        return []
    weights = "as observed" if plan.weights is None else _weights(plan.weights)
    found = [
        *([Fact("Asked for", plan.asked)] if plan.asked else []),
        Fact("Ratio", f"{plan.ratio:g}"),
        *(Fact(name[0].upper() + name[1:], value) for name, value in shape_settings(plan.settings)),
        Fact("Allocation", plan.allocation),
        Fact("Group weights", weights),
    ]
    if inputs.protected:
        found.append(Fact("Protected experts", f"{inputs.protected:,}"))
    matrices = plan.matrices.get("digest")
    if matrices:
        found.append(_digest("Digest of the new down projections", matrices))
    return [*found, _digest("Digest of the plan's scores", plan.scores_digest)]


def _digest(name: str, value: str) -> Fact:
    """A digest, of which the first digits are shown."""
    return Fact(name, value, f"{value[:_DIGITS]}..." if len(value) > _DIGITS else "")


def _recorded(value: object) -> str:
    return str(value or "not recorded")


def _weights(weights: Mapping[str, float]) -> str:
    return ", ".join(f"{group} {weight:g}" for group, weight in weights.items())
