"""What `reap-kernels compare --json` printed, as a table of the report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reap_driver.evaluation.comparison_file import FORMAT
from reap_driver.plan.published import public_name
from reap_driver.reporting import html
from reap_driver.reporting.html import Share

# Key of a figure -> its name, in the order of the table.
_FIGURES = {
    "original_perplexity": "perplexity, original",
    "pruned_perplexity": "perplexity, pruned",
    "perplexity_ratio": "perplexity, ratio",
    "kl": "KL divergence (nats)",
    "acceptance": "expected acceptance",
    "same_top": "same top token",
}
_RATES = {
    "orphan_rate": "Tokens that lose their first expert",
    "stranded_rate": "Tokens that lose all their experts",
    "retained_gate_share": "Gate weight of a token that stays",
}


def read_comparison(path: Path) -> dict[str, Any]:
    """Reads what `compare --json` printed.

    Raises:
        DataError: the file cannot be read, or is something else; names the field.
    """
    return FORMAT.read(path)


def comparison_table(found: Mapping[str, Any]) -> str:
    """Figures by group with their intervals, and what the plan did to the routing."""
    groups = found["groups"] if len(found["groups"]) > 1 else {}
    columns = {**groups, "all": found["overall"]}
    rows: list[list[html.Cell]] = [
        [name, *(_interval(figures[key]) for figures in columns.values())]
        for key, name in _FIGURES.items()
    ]
    rows.append(["predictions", *(f"{figures['predictions']:,}" for figures in columns.values())])
    names = (public_name(str(found.get(key))) for key in ("original", "pruned"))
    caption = (
        f"{' and '.join(names)} on the same text, with {100 * found['confidence']:g} % intervals"
    )
    rates = found.get("integrity") or {}
    known = [(name, str(Share(rates[key]))) for key, name in _RATES.items() if key in rates]
    table = html.table(caption, ["", *columns], rows)
    return table + (html.facts(known) if known else "")


def _interval(figure: Mapping[str, Any]) -> str | None:
    """`10.55 [10.2, 10.9]`; None where the figure is infinite, which JSON has as null."""
    value, low, high = figure["value"], figure["low"], figure["high"]
    if value is None:
        return None
    if low is None or high is None:
        return f"{value:.4g}"
    return f"{value:.4g} [{low:.4g}, {high:.4g}]"
