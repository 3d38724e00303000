"""The report as files: the page and its pictures, each complete or not there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from reap_driver.plan.plan import Plan
from reap_driver.reporting import html
from reap_driver.reporting.comparison import comparison_table
from reap_driver.reporting.gallery import (
    cut_pictures,
    group_pictures,
    load_pictures,
    margin_pictures,
)
from reap_driver.reporting.inputs import Inputs
from reap_driver.reporting.record import calibration, group_tables, record
from reap_driver.reporting.style import Picture
from reap_driver.reporting.verdict import layer_table, verdict
from reap_kernels import SaliencyStats
from reap_kernels.files import replaced

PAGE = "report.html"
PICTURES = ("cut", "map", "budget", "margin", "groups", "load")  # names a report can have
FILES = (PAGE, *(f"{name}.png" for name in PICTURES))


def write_report(
    stats: SaliencyStats,
    out: Path,
    plan: Plan | None = None,
    *,
    criterion: str | None = None,
    comparison: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Writes `report.html`, which needs no other file, and a PNG of every picture in it.

    Equal arguments give equal bytes.

    Args:
        stats: observed statistics.
        out: an existing folder; files of an earlier report in it are replaced or removed.
        plan: which experts stay, of the same model.
        criterion: what the scores shown are; default the plan's, or `reap`.
        comparison: from `read_comparison`, to be shown too.

    Returns:
        The files, the page first.

    Raises:
        PlanError: the plan does not belong to the statistics, or the criterion is unknown.
        DataError: see `reap_driver.score`.
    """
    inputs = Inputs.checked(stats, plan, criterion)
    sections: list[tuple[str, str, list[Picture], str]] = [
        ("cut", "The cut", cut_pictures(inputs), ""),
        ("margin", "How clear the decision is", margin_pictures(inputs), ""),
        ("groups", "Whom the experts serve", group_pictures(inputs), group_tables(inputs)),
        ("load", "How the router used the experts", load_pictures(inputs), ""),
    ]
    if comparison is not None:
        measured = comparison_table(comparison)
        sections.append(("comparison", "Measured beside the original", [], measured))
    pictures = [picture for _, _, drawn, _ in sections for picture in drawn]
    files = []
    for picture in pictures:
        with replaced(out / f"{picture.name}.png") as temporary:
            picture.save_png(temporary, inputs.model)
        files.append(out / f"{picture.name}.png")
    for name in set(PICTURES) - {picture.name for picture in pictures}:
        (out / f"{name}.png").unlink(missing_ok=True)
    with replaced(out / PAGE) as temporary:
        temporary.write_text(_page(inputs, sections), encoding="utf-8")
    return [out / PAGE, *files]


def _figures(pictures: list[Picture]) -> list[str]:
    return [html.figure(picture, titled=len(pictures) > 1) for picture in pictures]


def _page(inputs: Inputs, sections: Iterable[tuple[str, str, list[Picture], str]]) -> str:
    title = f"Expert report: {inputs.model}"
    shown = [(name, text, drawn, more) for name, text, drawn, more in sections if drawn or more]
    body = "".join(
        html.section(name, text, *_figures(drawn), more) for name, text, drawn, more in shown
    )
    layers = layer_table("All layers", inputs.layers, inputs)
    body += html.section("layers", "All layers", html.details("Show the table", layers))
    body += html.section("record", "Data and method", calibration(inputs), record(inputs))
    links = [(name, name.capitalize()) for name, *_ in shown]
    links += [("layers", "All layers"), ("record", "Data and method")]
    top = f"<h1>{html.escape(title)}</h1>\n{html.navigation(links)}{verdict(inputs)}"
    return html.page(title, top + body)
