"""Pieces of an HTML page: escaped text, tables, figures, and the one style sheet."""

from __future__ import annotations

import html
from collections.abc import Sequence

from reap_driver.reporting.style import Picture

Cell = str | int | float | None


class Share(float):
    """A share, shown in percent."""

    def __str__(self) -> str:
        return f"{100 * self:.2g}\u00a0%" if abs(self) < 0.01 else f"{100 * self:.1f}\u00a0%"


def escape(text: object) -> str:
    """Text as HTML shows it, whatever is in it."""
    return html.escape(str(text))


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(text)}</p>\n"


def section(name: str, title: str, *content: str) -> str:
    """A section with its heading; `name` is what links point to."""
    return (
        f'<section id="{name}" aria-labelledby="{name}-title">\n'
        f'<h2 id="{name}-title">{escape(title)}</h2>\n{"".join(content)}</section>\n'
    )


def details(summary: str, content: str) -> str:
    """Content that opens on demand; printed in any case."""
    return f"<details><summary>{escape(summary)}</summary>\n{content}</details>\n"


def table(caption: str, headings: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A table whose first column names the row; numbers are aligned on the right.

    Cells are text, numbers (whole ones with separators) or None, shown as a dash.
    """
    head = "".join(
        f'<th scope="col"{_align(column)}>{escape(heading)}</th>'
        for heading, column in zip(headings, _columns(rows, len(headings)), strict=True)
    )
    body = "".join(f"<tr>{_row(row)}</tr>\n" for row in rows)
    return (
        f'<div class="table" role="region" tabindex="0" aria-label="{escape(caption)}">'
        f"<table><caption><span>{escape(caption)}</span></caption>\n"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n"
    )


def _columns(rows: Sequence[Sequence[Cell]], number: int) -> list[Sequence[Cell]]:
    return [[row[column] for row in rows] for column in range(number)]


def _align(column: Sequence[Cell]) -> str:
    return ' class="number"' if any(isinstance(cell, int | float) for cell in column) else ""


def _row(row: Sequence[Cell]) -> str:
    first, *others = row
    cells = "".join(f"<td{_align([cell])}>{_cell(cell)}</td>" for cell in others)
    return f'<th scope="row"{_align([first])}>{_cell(first)}</th>{cells}'


def _cell(cell: Cell) -> str:
    if cell is None or cell != cell:  # NaN
        return "-"
    if isinstance(cell, float):
        return escape(cell) if isinstance(cell, Share) else f"{cell:.3g}"
    return escape(f"{cell:,}" if isinstance(cell, int) else cell)


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Names with their values."""
    items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>\n" for k, v in pairs)
    return f'<dl class="facts">\n{items}</dl>\n'


def tiles(items: Sequence[tuple[str, str, str]]) -> str:
    """Large numbers: (number, what it is, more about it)."""
    return (
        '<ul class="tiles">\n'
        + "".join(
            f"<li><strong>{escape(number)}</strong> <span>{escape(what)}</span> "
            f"<small>{escape(more)}</small></li>\n"
            for number, what, more in items
        )
        + "</ul>\n"
    )


def figure(picture: Picture, *, titled: bool) -> str:
    """A picture, drawn once for wide and once for narrow pages; untitled where its section's title
    says it.
    """
    title = f"<h3>{escape(picture.title)}</h3>\n" if titled else ""
    drawings = "".join(
        f'<div class="{kind}" role="img" aria-label="{escape(picture.text)}">'
        f"{picture.svg(narrow=kind == 'narrow')}</div>\n"
        for kind in ("wide", "narrow")
    )
    return (
        f'<figure id="picture-{picture.name}">{title}{drawings}'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>\n"
    )


def navigation(links: Sequence[tuple[str, str]]) -> str:
    """Links to the sections: (name, title)."""
    items = "".join(f'<li><a href="#{name}">{escape(title)}</a></li>' for name, title in links)
    return f'<nav aria-label="Sections"><ul>{items}</ul></nav>\n'


def page(title: str, body: str) -> str:
    """A whole page that needs nothing but itself."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_CSS}</style>\n</head>\n"
        f"<body>\n<main>\n{body}</main>\n</body>\n</html>\n"
    )


_CSS = """\
:root {
  color-scheme: light dark;
  --page: #ffffff; --panel: #f4f6f9; --ink: #1f2430; --muted: #5b6372; --grid: #d3d8e0;
  --accent: #0b5c99; --series-0: #0072b2; --series-1: #c44e00; --series-2: #00805e;
  --series-3: #a34c80; --series-4: #7d6100; --series-5: #2f7fae;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171d; --panel: #1d222b; --ink: #e8ebf0; --muted: #a7b0be; --grid: #3a424f;
    --accent: #8ec7f2; --series-0: #5fb4e8; --series-1: #f58a45; --series-2: #3cc79d;
    --series-3: #dc93bd; --series-4: #d0b04a; --series-5: #8fcdf0;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
main { max-width: 64rem; margin: 0 auto; padding: 1.25rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; padding-top: .75rem;
  border-top: 1px solid var(--grid); }
h3 { font-size: 1rem; margin: 0 0 .5rem; }
p { max-width: 46rem; margin: 0 0 .75rem; }
p.lead { font-size: 1.1rem; }
a { color: var(--accent); }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1rem; padding: 0; }
.tiles { list-style: none; display: grid; gap: .75rem; padding: 0; margin: 1rem 0;
  grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); }
.tiles li { background: var(--panel); border-radius: .5rem; padding: .75rem 1rem; }
.tiles strong { display: block; font-size: 1.6rem; line-height: 1.2; }
.tiles span { display: block; }
.tiles small { color: var(--muted); font-size: .85rem; }
.facts { display: grid; gap: .1rem 1.5rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); }
.facts div { border-bottom: 1px solid var(--grid); padding: .3rem 0; }
.facts dt { color: var(--muted); font-size: .85rem; }
.facts dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 1.25rem 0 1.75rem; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { color: var(--muted); font-size: .9rem; max-width: 46rem; margin-top: .5rem; }
.narrow { display: none; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .4rem; }
caption span { display: inline-block; position: sticky; left: 0;
  max-width: min(46rem, calc(100vw - 2rem)); }
th, td { text-align: left; padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--grid);
  vertical-align: top; }
th { font-weight: 600; white-space: nowrap; }
table { min-width: min(32rem, 100%); }
tbody th { font-weight: 400; }
td { white-space: nowrap; }
.number { text-align: right; }
details { margin: 1rem 0; }
summary { cursor: pointer; color: var(--accent); }
.note { border-left: .25rem solid var(--series-1); padding: .25rem 0 .25rem .75rem; }
@media (max-width: 40rem) {
  main { padding: .75rem; }
  .wide { display: none; }
  .narrow { display: block; }
  .tiles { grid-template-columns: 1fr 1fr; }
  .tiles strong { font-size: 1.3rem; }
}
@media print {
  :root {
    --page: #ffffff; --panel: #f4f6f9; --ink: #000000; --muted: #444444; --grid: #bbbbbb;
    --accent: #000000;
  }
  main { max-width: none; padding: 0; }
  nav { display: none; }
  .wide { display: block; }
  .narrow { display: none; }
  .table { overflow: visible; }
  details::details-content { content-visibility: visible; block-size: auto; }
  summary { display: none; }
  figure, tr, .tiles li { break-inside: avoid; }
  h2, h3, caption { break-after: avoid; }
}
"""
