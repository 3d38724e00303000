"""What a comparison found: as a result, as JSON and as a table."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reap_driver.evaluation import tasks
from reap_driver.evaluation.comparison_file import FORMAT
from reap_driver.evaluation.figures import Estimate, Figures
from reap_driver.evaluation.sequences import Comparison
from reap_driver.workflow.results import Result

# Name in tables, attribute of `Figures`, digits.
_ROWS = (
    ("perplexity, original", "original_perplexity", 4),
    ("perplexity, pruned", "pruned_perplexity", 4),
    ("perplexity, ratio", "perplexity_ratio", 4),
    ("KL divergence (nats)", "kl", 3),
    ("expected acceptance", "acceptance", 4),
    ("same top token", "same_top", 4),
)


@dataclass(frozen=True, repr=False)
class Compared(Result):
    """What a comparison found.

    Attributes:
        original, pruned: what was compared, as given.
        comparison: of their predictions; None where only tasks were asked for.
        data: provenance of each source.
        integrity: what the plan does to the original's routing, where that is known.
        tasks: results of the original and of the pruned model; None without tasks.

    Example:
        >>> compared = rd.compare("MODEL", plan, "code.jsonl:40", seq_len=64)
        >>> sorted(compared.comparison.by_group)
        ['code']
    """

    original: str
    pruned: str
    comparison: Comparison | None
    data: list[dict[str, Any]]
    integrity: dict[str, Any]
    tasks: tuple[tasks.Results, tasks.Results] | None

    def facts(self) -> dict[str, Any]:
        """See `Result`; with a comparison, what `report` reads."""
        found: dict[str, Any] = {"original": self.original, "pruned": self.pruned}
        if self.comparison is not None:
            groups = self.comparison.by_group
            found = {
                "format": FORMAT.name,
                "version": FORMAT.version,
                **found,
                "confidence": 0.95,
                "draws": self.comparison.draws,
                "overall": _facts(self.comparison.overall),
                "groups": {name: _facts(figures) for name, figures in groups.items()},
                "data": self.data,
            }
        if self.integrity:
            found["integrity"] = self.integrity
        if self.tasks is not None:
            found["tasks"] = {"original": self.tasks[0], "pruned": self.tasks[1]}
        return found

    def describe(self) -> str:
        """See `Result`."""
        parts = []
        if self.comparison is not None:
            parts.append(figures_table(self.comparison))
        if self.integrity:
            parts.append(integrity_lines(self.integrity))
        if self.tasks is not None:
            parts.append(tasks.table(*self.tasks))
        return "\n".join(parts)


def _facts(figures: Figures) -> dict[str, Any]:
    found: dict[str, Any] = {"sequences": figures.sequences, "predictions": figures.predictions}
    for _, name, _ in _ROWS:
        estimate: Estimate = getattr(figures, name)
        found[name] = {key: _number(value) for key, value in vars(estimate).items()}
    return found


def _number(value: float | None) -> float | None:
    """JSON has no infinities."""
    return value if value is None or math.isfinite(value) else None


def figures_table(comparison: Comparison) -> str:
    """The figures as a table, a block for each group and one for all."""
    groups = comparison.by_group
    blocks = dict(groups) if len(groups) > 1 else {}
    blocks["all" if blocks else next(iter(groups))] = comparison.overall
    lines = []
    for title, figures in blocks.items():
        lines.append(
            f"{title}: {figures.predictions:,} predictions in {figures.sequences:,} sequences"
        )
        for name, attribute, digits in _ROWS:
            lines.append(f"  {name:<22}{_shown(getattr(figures, attribute), digits)}")
    return "\n".join(lines)


def _shown(estimate: Estimate, digits: int) -> str:
    """A figure with its interval."""
    text = f"{estimate.value:#.{digits}g}"
    if estimate.low is None:
        return f"{text:>9}  no interval: a group has one sequence"
    return f"{text:>9}  [{estimate.low:#.{digits}g}, {estimate.high:#.{digits}g}]"


def integrity_lines(found: Mapping[str, Any]) -> str:
    """What the plan does to the routing, in lines."""
    lines = ["what was pruned"]
    if "orphan_rate" in found:
        rates = found["orphans_by_layer"]
        worst = max(rates, key=rates.__getitem__)
        lines += [
            f"  orphans               {found['orphan_rate']:.1%} of tokens lose their first expert"
            f" (most in {worst}: {rates[worst]:.1%})",
            f"  stranded              {found['stranded_rate']:.2%} of tokens lose all of them",
            f"  retained routing      {found['retained_gate_share']:.1%} of a token's router "
            "weights",
        ]
    if "dead_kept" in found:
        lines.append(
            f"  calibration           kept {found['calibration_gate_share']:.1%} of router "
            f"weights, {found['calibration_saliency_share']:.1%} of saliency; "
            f"{found['dead_kept']} of the kept experts and {found['dead_removed']} of the removed "
            "were never routed to"
        )
    if "misplaced" in found:
        wrong = found["misplaced"]
        said = f"{len(wrong)} PROBLEMS, first: {wrong[0]}" if wrong else "all in the plan's order"
        lines.append(
            f"  experts and routers   {said} ({found['layers_checked']} decoder layers checked)"
        )
    return "\n".join(lines)
