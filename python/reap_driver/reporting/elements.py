"""What a page of the report is made of, as data; the templates beside it make the markup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jinja2 import Environment, PackageLoader, StrictUndefined

from reap_driver.base.units import significant


class Share(float):
    """A share in [0, 1], shown in percent."""

    def __str__(self) -> str:
        return f"{100 * self:.2g}\u00a0%" if abs(self) < 0.01 else f"{100 * self:.1f}\u00a0%"


Cell = str | int | float | None


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    kind: ClassVar[str] = "paragraph"
    text: str


@dataclass(frozen=True)
class Table:
    """A table whose first column names the row; see `shown` for how cells look.

    Attributes:
        caption: above it.
        headings: of the columns.
        rows: their cells.
        stacked: whether a phone shows each row as a block of names and values, which needs no
            scrolling to the side; of a long table that would be a long page.
    """

    kind: ClassVar[str] = "table"
    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    stacked: bool = True

    @property
    def numeric(self) -> list[bool]:
        """Whether each column holds numbers, which are aligned on the right."""
        columns = range(len(self.headings))
        return [any(is_number(row[column]) for row in self.rows) for column in columns]


@dataclass(frozen=True)
class Fact:
    """A name and its value; `short` stands for a long value, which opens on demand."""

    name: str
    value: str
    short: str = ""


@dataclass(frozen=True)
class Facts:
    """Names and values, side by side."""

    kind: ClassVar[str] = "facts"
    items: Sequence[Fact]


@dataclass(frozen=True)
class Figure:
    """A picture on the page.

    Attributes:
        name: of the picture; the id of its element is `picture-NAME`.
        title: above it; empty where the title of its section says the same.
        text: what it shows, for readers who do not see it.
        caption: how to read it.
        wide: `<svg>` element for wide pages, which matplotlib wrote and escaped.
        narrow: the same for a phone.
    """

    kind: ClassVar[str] = "figure"
    name: str
    title: str
    text: str
    caption: str
    wide: str
    narrow: str


@dataclass(frozen=True)
class Folded:
    """A table that opens on demand, and is printed in any case."""

    kind: ClassVar[str] = "folded"
    summary: str
    table: Table


Part = Paragraph | Table | Facts | Figure | Folded


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading.

    Attributes:
        name: what links point to.
        title: its heading.
        link: its name in the navigation.
        parts: what it shows.
    """

    name: str
    title: str
    link: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Tile:
    """A large number: what it counts, and more about it."""

    number: str
    what: str
    more: str


@dataclass(frozen=True)
class Term:
    """A word that the page uses: what it means, and what to do about it."""

    name: str
    meaning: str
    advice: str


@dataclass(frozen=True)
class Summary:
    """The first screen: the result in words, large numbers, the words it uses, notes, and where to
    look first.
    """

    lead: str
    tiles: Sequence[Tile]
    terms: Sequence[Term]
    notes: Sequence[str]
    first: Table | None


@dataclass(frozen=True)
class Page:
    """The whole page."""

    title: str
    summary: Summary
    sections: Sequence[Section]


def render(page: Page) -> str:
    """The page as HTML that needs no other file. All text is escaped, whatever is in it."""
    environment = Environment(
        loader=PackageLoader("reap_driver.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["shown"] = shown
    environment.tests["numeric"] = is_number
    html: str = environment.get_template("report.html").render(page=page)
    return html


def is_number(cell: Cell) -> bool:
    """Whether a cell holds a number."""
    return isinstance(cell, int | float)


def shown(cell: Cell) -> str:
    """A cell as text: whole numbers with separators, others with three digits, none as a dash."""
    if cell is None or cell != cell:  # NaN
        return "-"
    if isinstance(cell, float):
        return str(cell) if isinstance(cell, Share) else significant(cell, 3)
    return f"{cell:,}" if isinstance(cell, int) else cell
