"""Formats the demo's results as a table: each criterion next to the unpruned model."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import Any

from reap_driver.base.units import COLUMNS

_COLUMNS = "{:<25}{:>8}{:>8}{:>20}{:>19}"


def format_report(report: dict[str, Any]) -> str:
    """The table, the samples and the paths of the results, from what ``run_demo`` returns."""
    base, pruned = report["unpruned"], report["pruned"]
    lines = [
        _COLUMNS.format("", "experts", "size", "perplexity", "agreement"),
        _line("unpruned", [base]),
    ]
    for ratio in sorted({row["ratio"] for row in pruned}):
        lines.append("")
        for criterion in dict.fromkeys(row["criterion"] for row in pruned):
            rows = [r for r in pruned if (r["ratio"], r["criterion"]) == (ratio, criterion)]
            name = f"{criterion}, {len(rows)} seeds" if len(rows) > 1 else criterion
            lines.append(_line(f"{ratio:.0%} less: {name}", rows))
    domains = len(base["domain_perplexity"])
    lines += [
        "",
        *textwrap.wrap(
            f"Perplexity on {report['held_out_tokens']:,} held-out tokens of {domains} domains, "
            f"weighted equally; plans made from {report['calibration_tokens']:,} other tokens. "
            "Agreement: share of positions where the pruned model's most likely next token is the "
            "unpruned model's. Several seeds: mean (lowest-highest).",
            COLUMNS,
            break_on_hyphens=False,
        ),
        "",
        *(line for name, text in report["samples"].items() for line in _sample(name, text)),
        f"Picture: {report['picture']}",
        *(f"Checkpoint: {path}" for path in report["checkpoints"]),
        f"{report['seconds']} seconds",
    ]
    return "\n".join(lines)


def _sample(name: str, text: str) -> list[str]:
    lines = (f"    {line}".rstrip() for line in text.splitlines())
    return [f"A sample of {name}, loaded with AutoModelForCausalLM:", "", *lines, ""]


def _line(name: str, rows: list[dict[str, Any]]) -> str:
    return _COLUMNS.format(
        name,
        rows[0]["experts"],
        f"{rows[0]['bytes'] / 1e6:.1f} MB",
        _spread((row["perplexity"] for row in rows), "{:.2f}"),
        _spread((100 * row["agreement"] for row in rows), "{:.1f} %"),
    )


def _spread(values: Iterable[float], form: str) -> str:
    """A single value as it is; several values as their mean and range."""
    numbers = list(values)
    mean = form.format(sum(numbers) / len(numbers))
    if len(numbers) == 1:
        return mean
    low, high = form.format(min(numbers)), form.format(max(numbers))
    return f"{mean} ({low.removesuffix(' %')}-{high.removesuffix(' %')})"
