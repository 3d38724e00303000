"""What `reap-kernels compare --json` printed, as tables of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reap_driver.base.units import significant
from reap_driver.evaluation.comparison_file import read
from reap_driver.planning.public_provenance import public_name
from reap_driver.reporting.elements import Cell, Fact, Facts, Part, Share, Table

# Key of a figure -> its name, in the order of the table.
_FIGURES = {
    "original_perplexity": "perplexity, original",
    "pruned_perplexity": "perplexity, pruned",
    "perplexity_ratio": "perplexity, ratio",
    "kl": "KL divergence (nats)",
    "acceptance": "expected acceptance",
    "same_top": "same top token",
}
_UNSEEN = " (not calibrated on)"
_RATES = {
    "orphan_rate": "Tokens that lose their first expert",
    "stranded_rate": "Tokens that lose all their experts",
    "retained_gate_share": "Share of a token's router weight that is kept",
}


def read_comparison(path: Path) -> dict[str, Any]:
    """Reads what `compare --json` printed, of one pruned model or of several.

    Raises:
        DataError: the file cannot be read or is not a comparison; names the field.
    """
    return read(path)


def comparison_parts(found: Mapping[str, Any]) -> list[Part]:
    """Figures with their intervals, and what plans did to the routing."""
    if "comparisons" in found:
        return _several(found)
    groups = found["groups"] if len(found["groups"]) > 1 else {}
    unseen = found.get("not_calibrated_on", ())
    whole = "all" + (_UNSEEN if set(unseen) >= set(found["groups"]) else "")
    columns = {name + _UNSEEN if name in unseen else name: own for name, own in groups.items()}
    columns[whole] = found["overall"]
    rows: list[list[Cell]] = [
        [name, *(_interval(figures[key]) for figures in columns.values())]
        for key, name in _FIGURES.items()
    ]
    rows.append(["predictions", *(f"{figures['predictions']:,}" for figures in columns.values())])
    names = (public_name(str(found.get(key))) for key in ("original", "pruned"))
    caption = (
        f"{' and '.join(names)} on the same text, with {100 * found['confidence']:g} % intervals"
    )
    rates = found.get("integrity") or {}
    known = [Fact(name, str(Share(rates[key]))) for key, name in _RATES.items() if key in rates]
    table = Table(caption, ["", *columns], rows)
    return [table, Facts(known)] if known else [table]


def _several(found: Mapping[str, Any]) -> list[Part]:
    """A row for each pruned model, over all groups."""
    each, original = found["comparisons"], public_name(str(found["original"]))
    figures = {key: name for key, name in _FIGURES.items() if key != "original_perplexity"}
    rates = {key: name for key, name in _RATES.items() if all(key in _rates(one) for one in each)}
    rows: list[list[Cell]] = [
        [
            public_name(str(one["pruned"])),
            *(_interval(one["overall"][key]) for key in figures),
            *(str(Share(_rates(one)[key])) for key in rates),
        ]
        for one in each
    ]
    first = each[0]["overall"]
    caption = (
        f"{len(each)} pruned models, each compared with {original} (perplexity "
        f"{_interval(first['original_perplexity'])}) on the same {first['predictions']:,} "
        f"predictions, with {100 * each[0]['confidence']:g} % intervals"
    )
    table = Table(caption, ["pruned", *figures.values(), *rates.values()], rows)
    return [table, *_by_group(each)]


def _by_group(each: Sequence[Mapping[str, Any]]) -> list[Part]:
    """The expected acceptance of each pruned model in each group, where there are several."""
    groups = list(each[0]["groups"])
    if len(groups) < 2 or any(list(one["groups"]) != groups for one in each):
        return []
    unseen = set(groups).intersection(*(one.get("not_calibrated_on", ()) for one in each))
    headings = [name + _UNSEEN if name in unseen else name for name in groups]
    rows: list[list[Cell]] = [
        [
            public_name(str(one["pruned"])),
            *(_interval(one["groups"][name]["acceptance"]) for name in groups),
        ]
        for one in each
    ]
    return [Table("Expected acceptance in each group", ["pruned", *headings], rows)]


def _rates(one: Mapping[str, Any]) -> Mapping[str, float]:
    """What a plan did to the routing, where that is known."""
    rates: Mapping[str, float] = one.get("integrity") or {}
    return rates


def _interval(figure: Mapping[str, Any]) -> str | None:
    """`10.55 [10.20, 10.90]`; None for an infinite figure, which JSON stores as null."""
    value, low, high = figure["value"], figure["low"], figure["high"]
    if value is None:
        return None
    if low is None or high is None:
        return significant(value)
    return f"{significant(value)} [{significant(low)}, {significant(high)}]"
