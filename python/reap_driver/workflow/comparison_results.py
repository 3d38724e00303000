"""What a comparison found: as a result, as JSON and as a table."""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from reap_driver.base.units import row, significant
from reap_driver.evaluation import tasks
from reap_driver.evaluation.comparison_file import FORMAT, MANY
from reap_driver.evaluation.figures import Difference, Estimate, Figures
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
# Of several pruned models: heading, attribute, digits; each with its interval, or without.
_COLUMNS = (
    ("perplexity", "pruned_perplexity", 4, True),
    ("KL", "kl", 3, False),
    ("accepted", "acceptance", 4, False),
    ("same top", "same_top", 4, False),
)
_NAME, _WITH, _WITHOUT, _WIDTH = 22, 24, 10, 78  # widths of columns, and of a heading


@dataclass(frozen=True, repr=False)
class Compared(Result):
    """What a comparison found.

    Attributes:
        original, pruned: what was compared, as given.
        comparison: of their predictions; None where only tasks were asked for.
        data: provenance of each source.
        integrity: what the plan does to the original's routing, where that is known.
        tasks: results of the original and of the pruned model; None without tasks.
        unseen: groups that the plan was not calibrated on, sorted; empty where that is not known.

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
    unseen: tuple[str, ...] = ()

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
                **({"not_calibrated_on": list(self.unseen)} if self.unseen else {}),
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
            parts.append(figures_table({self.pruned: self.comparison}, self.unseen))
        if self.integrity:
            parts.append(integrity_lines(self.integrity))
        if self.tasks is not None:
            first, other = self.tasks
            parts.append(tasks.table(first, {self.pruned: other}))
        return "\n".join(parts)


@dataclass(frozen=True, repr=False)
class Comparisons(Result):
    """What comparisons of several pruned models with one original found, on the same text.

    Attributes:
        compared: of each pruned model, in the order given.

    Example:
        >>> both = rd.compare("MODEL", [plan, smaller], "code.jsonl:40", seq_len=64)
        >>> len(both.compared), len({one.comparison.overall.predictions for one in both.compared})
        (2, 1)
        >>> both.differences[0].kl.low > 0  # the second follows the original less closely
        True
    """

    compared: tuple[Compared, ...]

    @property
    def differences(self) -> tuple[Difference, ...]:
        """Of each pruned model after the first from the first, over all groups; empty where only
        tasks were asked for.
        """
        known = [one.comparison for one in self.compared if one.comparison is not None]
        return tuple(other.less(known[0]) for other in known[1:])

    def facts(self) -> dict[str, Any]:
        """See `Result`; with comparisons of predictions, what `report` reads."""
        first, *others = self.compared
        found: dict[str, Any] = {"original": first.original}
        if first.comparison is not None:
            found = {"format": MANY.name, "version": MANY.version, **found}
        of_all = ("format", "version", "original")
        each = ((one.facts(), one) for one in self.compared)
        found["comparisons"] = [
            {key: value for key, value in facts.items() if key not in of_all} for facts, _ in each
        ]
        found["differences"] = [
            {"pruned": other.pruned, "less": first.pruned, **_estimates(difference)}
            for other, difference in zip(others, self.differences, strict=False)
        ]
        return found

    def describe(self) -> str:
        """See `Result`."""
        parts = []
        known = {one.pruned: one.comparison for one in self.compared if one.comparison is not None}
        if known:
            parts.append(figures_table(known, shared([one.unseen for one in self.compared])))
        parts += [
            integrity_lines(one.integrity, one.pruned) for one in self.compared if one.integrity
        ]
        answers = {one.pruned: one.tasks[1] for one in self.compared if one.tasks is not None}
        if answers:
            first = self.compared[0].tasks
            assert first is not None
            parts.append(tasks.table(first[0], answers))
        return "\n".join(parts)


def _facts(figures: Figures) -> dict[str, Any]:
    counts = {"sequences": figures.sequences, "predictions": figures.predictions}
    return {**counts, **_estimates(figures)}


def _estimates(figures: Figures | Difference) -> dict[str, Any]:
    """The estimates among the attributes."""
    return {
        name: {key: _number(value) for key, value in vars(estimate).items()}
        for name, estimate in vars(figures).items()
        if isinstance(estimate, Estimate)
    }


def _number(value: float | None) -> float | None:
    """JSON has no infinities."""
    return value if value is None or math.isfinite(value) else None


def shared(unseen: Iterable[Collection[str]]) -> set[str]:
    """Groups that none of several plans was calibrated on; `unseen` has those of each plan."""
    each = [set(groups) for groups in unseen]
    return set.intersection(*each) if each else set()


def figures_table(found: Mapping[str, Comparison], unseen: Collection[str] = ()) -> str:
    """The figures as a table, a block for each group and one for all.

    Args:
        found: name of a pruned model -> its comparison, all on the same text.
        unseen: groups that none of them was calibrated on, which are marked.
    """
    blocks = {name: groups_and_all(comparison) for name, comparison in found.items()}
    lines = []
    for title in next(iter(blocks.values())):
        each = {name: own[title] for name, own in blocks.items()}
        figures = next(iter(each.values()))
        mark = ", not calibrated on" if title in unseen else ""
        lines.append(
            f"{title}: {figures.predictions:,} predictions in {figures.sequences:,} sequences{mark}"
        )
        if len(found) > 1:
            lines += _side_by_side(each)
            continue
        for name, attribute, digits in _ROWS:
            lines.append(f"  {name:<22}{_shown(getattr(figures, attribute), digits)}")
    if len(found) > 1:
        lines += _differences(found)
    return "\n".join(lines)


def groups_and_all(comparison: Comparison) -> dict[str, Figures]:
    """The figures of each group, and of all where there are several."""
    groups = comparison.by_group
    return {**groups, "all": comparison.overall} if len(groups) > 1 else groups


def _side_by_side(each: Mapping[str, Figures]) -> list[str]:
    """A row for the original and one for each pruned model."""
    head = "".join(
        f"{name:<{_WITH}}" if interval else f"{name:>{_WITHOUT}}"
        for name, _, _, interval in _COLUMNS
    )
    original = next(iter(each.values())).original_perplexity
    lines = [f"  {'':<{_NAME}}{head}".rstrip()]
    lines.append(f"  {'the original':<{_NAME}}{_compact(original, 4)}")
    for name, figures in each.items():
        cells = (
            f"{_compact(getattr(figures, attribute), digits):<{_WITH}}"
            if interval
            else f"{significant(getattr(figures, attribute).value, digits):>{_WITHOUT}}"
            for _, attribute, digits, interval in _COLUMNS
        )
        lines.append(f"  {_fitted(name, _NAME - 1):<{_NAME}}{''.join(cells)}".rstrip())
    return lines


def _differences(found: Mapping[str, Comparison]) -> list[str]:
    """How each pruned model compares with the first, on the same sequences."""
    (name, first), *others = found.items()
    lines = [f"compared with {_fitted(name, _WIDTH - 45)}, on the same sequences"]
    lines.append(f"  {'':<{_NAME}}{'perplexity, ratio':<{_WITH}}KL, difference")
    for other, comparison in others:
        difference = comparison.less(first)
        ratio, kl = _compact(difference.perplexity_ratio, 4), _compact(difference.kl, 3)
        lines.append(f"  {_fitted(other, _NAME - 1):<{_NAME}}{ratio:<{_WITH}}{kl}")
    return lines


def _fitted(name: str, width: int) -> str:
    """A name, its beginning left out where it is longer."""
    return name if len(name) <= width else f"...{name[3 - width :]}"


def _shown(estimate: Estimate, digits: int) -> str:
    """A figure with its interval, in columns."""
    text = f"{significant(estimate.value, digits):>9}"
    if estimate.low is None:
        return f"{text}  no interval: a group has one sequence"
    return f"{text}  {_interval(estimate, digits)}"


def _compact(estimate: Estimate, digits: int) -> str:
    """A figure with its interval, where there is one."""
    text = significant(estimate.value, digits)
    return text if estimate.low is None else f"{text} {_interval(estimate, digits)}"


def _interval(estimate: Estimate, digits: int) -> str:
    assert estimate.low is not None
    assert estimate.high is not None
    return f"[{significant(estimate.low, digits)}, {significant(estimate.high, digits)}]"


def integrity_lines(found: Mapping[str, Any], name: str = "") -> str:
    """What the plan does to the routing, in lines.

    Args:
        found: see `Compared.integrity`.
        name: of the pruned model, where there are several.
    """
    rows: list[tuple[str, str]] = []
    if "orphan_rate" in found:
        rates = found["orphans_by_layer"]
        worst = max(rates, key=rates.__getitem__)
        rows += [
            (
                "orphans",
                f"{found['orphan_rate']:.1%} of tokens lose their first expert; "
                f"{rates[worst]:.1%} in {worst}",
            ),
            ("stranded", f"{found['stranded_rate']:.2%} of tokens lose all of them"),
            (
                "retained routing",
                f"{found['retained_gate_share']:.1%} of a token's router weights",
            ),
        ]
    if "dead_kept" in found:
        rows.append(
            (
                "calibration",
                f"kept {found['calibration_gate_share']:.1%} of router weights, "
                f"{found['calibration_saliency_share']:.1%} of saliency; {found['dead_kept']} of "
                f"the kept experts and {found['dead_removed']} of the removed were never routed to",
            )
        )
    if "misplaced" in found:
        wrong = found["misplaced"]
        said = f"{len(wrong)} PROBLEMS, first: {wrong[0]}" if wrong else "all in the plan's order"
        again = len(found.get("solved_again", ()))
        said += f"; down projections of {again} layers were solved again" if again else ""
        rows.append(
            ("experts and routers", f"{said} ({found['layers_checked']} decoder layers checked)")
        )
    title = f"what was pruned{': ' if name else ''}{_fitted(name, _WIDTH - 20)}"
    return "\n".join([title, *(row(f"  {what}", text, _NAME + 2) for what, text in rows)])
