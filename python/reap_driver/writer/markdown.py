"""Markdown of text from elsewhere: names of data, models and files are shown, and have no effect.

Plain words and numbers stand as they are. All else stands as code, in which nothing is a tag, a
link or markup. In a template of `template`, every expression is escaped so, unless it is a
`Markdown` already.
"""

import functools
import re
from collections.abc import Iterable, Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

# No character that Markdown or HTML gives a meaning, and none that begins a list or a heading.
_PLAIN = re.compile(r"[^\W_](?:[\w .,:;/()%+='\"|-]*[\w.,:;()%'\"|-])?")
_MARKUP = re.compile(r"(?<![^\W_])_|_(?![^\W_])|://|\bwww\.", re.IGNORECASE)


class Markdown(str):
    """Text that is Markdown already, and is not escaped again."""

    __slots__ = ()


def text(value: object) -> Markdown:
    """A value in running text.

    Example:
        >>> text("tools_v2, 0.3"), text("<b>x</b>"), text("see [this](http://a.b)")
        ('tools_v2, 0.3', '`<b>x</b>`', '`see [this](http://a.b)`')
    """
    if isinstance(value, Markdown):
        return value
    words = _printable(value)
    plain = _PLAIN.fullmatch(words) and not _MARKUP.search(words)
    return Markdown(words) if plain else code(words)


def code(value: object) -> Markdown:
    """A value as code, whatever backticks are in it; nothing where it is empty."""
    words = _printable(value)
    if not words:
        return Markdown("")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", words)), default=0))
    space = " " if words.startswith("`") or words.endswith("`") else ""
    return Markdown(f"{fence}{space}{words}{space}{fence}")


def listed(values: Iterable[object]) -> Markdown:
    """Values in running text, with commas between."""
    return Markdown(", ".join(map(text, values)))


def table(rows: Sequence[Sequence[object]]) -> Markdown:
    """A table without a line break at its end; the first row holds the headings.

    Example:
        >>> print(table([("group", "tokens"), ("a|b", 3)]))
        | group | tokens |
        | --- | --- |
        | a\\|b | 3 |
    """
    headings, *others = rows
    lines = [headings, [Markdown("---")] * len(headings), *others]
    return Markdown("\n".join(f"| {' | '.join(map(_cell, row))} |" for row in lines))


@functools.cache
def template(package: str, name: str) -> Template:
    """A template in a package's folder `templates`; `text` is applied to every expression in it.

    Compiled once: that takes longer than writing a small checkpoint.
    """
    environment = Environment(
        loader=PackageLoader(package),
        autoescape=False,
        finalize=text,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": code, "listed": listed, "table": table}
    return environment.get_template(name)


def _cell(value: object) -> str:
    """One cell: a bar in it, and backslashes before it, would end it."""
    return re.sub(r"(\\*)\|", lambda bar: 2 * bar[1] + "\\|", " ".join(text(value).split()))


def _printable(value: object) -> str:
    """One line, without characters that command terminals or turn the direction of text."""
    words = " ".join(str(value).split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
