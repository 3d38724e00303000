"""Formats the demo's results as a table: each criterion next to the unpruned model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_COLUMNS = "{:<26} {:>7} {:>8} {:>24} {:>24}"


def format_report(report: dict[str, Any]) -> str:
    """The table, the samples and the paths of the results, from what ``run_demo`` returns."""
    base, pruned = report["unpruned"], report["pruned"]
    lines = [
        _COLUMNS.format("", "experts", "size", "held-out perplexity", "next-token agreement"),
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
        f"{report['held_out_tokens']:,} held-out tokens of {domains} domains, weighted equally;"
        f" plans made from {report['calibration_tokens']:,} other tokens.",
        "Several seeds: mean (lowest to highest). Agreement: share of positions where the pruned"
        " model's",
        "most likely next token is the unpruned model's.",
        "",
        *(line for name, text in report["samples"].items() for line in _sample(name, text)),
        f"Picture: {report['picture']}    Checkpoints: {', '.join(report['checkpoints'])}",
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
    return f"{mean} ({low.removesuffix(' %')} to {high.removesuffix(' %')})"
