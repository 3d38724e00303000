"""Writes a report: the page and its pictures, each file complete or not there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap_driver.planning.plan import Plan
from reap_driver.reporting.comparison import comparison_parts
from reap_driver.reporting.elements import Figure, Folded, Page, Part, Section, render
from reap_driver.reporting.groups import group_parts
from reap_driver.reporting.inputs import Inputs
from reap_driver.reporting.record import calibration, method
from reap_driver.reporting.summary import layer_table, summary
from reap_kernels import SaliencyStats
from reap_kernels.files import replaced

if TYPE_CHECKING:
    from reap_driver.reporting.style import Rendered

PAGE = "report.html"
PICTURES = ("cut", "map", "budget", "margin", "groups", "load")  # names a report can have
FILES = (PAGE, *(f"{name}.png" for name in PICTURES))


@dataclass(frozen=True)
class WrittenReport:
    """A report on disk. Iterating gives its files, the page first.

    Attributes:
        page: the HTML file.
        pictures: PNG files beside it, in the order of the page.
    """

    page: Path
    pictures: tuple[Path, ...]

    def __iter__(self) -> Iterator[Path]:
        yield self.page
        yield from self.pictures


def write_report(
    stats: SaliencyStats,
    out: Path,
    plan: Plan | None = None,
    *,
    criterion: str | None = None,
    comparison: Mapping[str, Any] | None = None,
) -> WrittenReport:
    """Writes `report.html`, which needs no other file, and a PNG file of every picture in it.

    Equal arguments give equal bytes.

    Args:
        stats: observed statistics.
        out: an existing folder; the files of an earlier report in it are replaced or removed.
        plan: which experts are kept, of the same model; None shows the statistics alone.
        criterion: criterion of the scores shown; None takes the plan's, or `reap` without a plan.
        comparison: a comparison to show as well, from `read_comparison`.

    Returns:
        The files written.

    Raises:
        PlanError: the plan was not made for the model observed, or the criterion is unknown.
        DataError: the statistics cannot be scored; see `reap_driver.score`.
    """
    from reap_driver.reporting import pictures  # imports matplotlib, which takes a while

    inputs = Inputs.checked(stats, plan, criterion)
    drawn = {
        section: [picture.render(inputs.model) for picture in of_section]
        for section, of_section in pictures.of_sections(inputs).items()
    }
    page = _page(inputs, drawn, comparison)
    every = {one.picture.name: one.png for of_section in drawn.values() for one in of_section}
    for name, png in every.items():
        with replaced(out / f"{name}.png") as temporary:
            temporary.write_bytes(png)
    for name in set(PICTURES) - set(every):
        (out / f"{name}.png").unlink(missing_ok=True)
    with replaced(out / PAGE) as temporary:
        temporary.write_text(render(page), encoding="utf-8")
    return WrittenReport(out / PAGE, tuple(out / f"{name}.png" for name in every))


def _page(
    inputs: Inputs, drawn: Mapping[str, Sequence[Rendered]], comparison: Mapping[str, Any] | None
) -> Page:
    """The page, from the top; sections without content are left out."""
    sections = [
        Section("cut", "The cut", "Cut", _figures(drawn["cut"])),
        Section("margin", "How clear the decision is", "Margin", _figures(drawn["margin"])),
        Section(
            "groups",
            "Which groups the experts serve",
            "Groups",
            [*_figures(drawn["groups"]), *group_parts(inputs)],
        ),
        Section("load", "How the router used the experts", "Load", _figures(drawn["load"])),
        Section(
            "comparison",
            "Compared with the original",
            "Comparison",
            [] if comparison is None else comparison_parts(comparison),
        ),
        Section(
            "layers",
            "All layers",
            "All layers",
            [
                Folded(
                    "Show the table",
                    layer_table("All layers", inputs.layers, inputs, stacked=False),
                )
            ],
        ),
        Section(
            "record", "Data and method", "Data and method", [calibration(inputs), method(inputs)]
        ),
    ]
    shown = [section for section in sections if section.parts]
    return Page(f"Expert report: {inputs.model}", summary(inputs), shown)


def _figures(drawn: Sequence[Rendered]) -> list[Part]:
    """Pictures of one section; a single one has the section's title."""
    return [
        Figure(
            name=one.picture.name,
            title=one.picture.title if len(drawn) > 1 else "",
            text=one.picture.text,
            caption=one.picture.caption,
            wide=one.wide,
            narrow=one.narrow,
        )
        for one in drawn
    ]
