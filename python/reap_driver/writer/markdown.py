"""Markdown of text from elsewhere: names of data, models and files are shown, and do nothing.

Plain words and numbers stand as they are. All else stands as code, in which nothing is a tag, a
link or markup.
"""

import re
from collections.abc import Iterable, Sequence

# No character that Markdown or HTML gives a meaning, and none that begins a list or a heading.
_PLAIN = re.compile(r"[^\W_](?:[\w .,:;/()%+='\"|-]*[\w.,:;()%'\"|-])?")
_MARKUP = re.compile(r"(?<![^\W_])_|_(?![^\W_])|://|\bwww\.", re.IGNORECASE)


def text(value: object) -> str:
    """A value in running text.

    Example:
        >>> text("tools_v2, 0.3"), text("<b>x</b>"), text("see [this](http://a.b)")
        ('tools_v2, 0.3', '`<b>x</b>`', '`see [this](http://a.b)`')
    """
    words = _printable(value)
    return words if _PLAIN.fullmatch(words) and not _MARKUP.search(words) else code(words)


def code(value: object) -> str:
    """A value as code, whatever backticks are in it; nothing where it is empty."""
    words = _printable(value)
    if not words:
        return ""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", words)), default=0))
    space = " " if words.startswith("`") or words.endswith("`") else ""
    return f"{fence}{space}{words}{space}{fence}"


def bullets(lines: Iterable[str]) -> str:
    """A list of lines that are Markdown already."""
    return "".join(f"- {line}\n" for line in lines)


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; cells are Markdown already."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(map(_cell, row))} |\n" for row in lines)


def _cell(value: object) -> str:
    """One cell: a bar in it, and backslashes before it, would end it."""
    return re.sub(r"(\\*)\|", lambda bar: 2 * bar[1] + "\\|", " ".join(str(value).split()))


def _printable(value: object) -> str:
    """One line, without characters that command terminals or turn the direction of text."""
    words = " ".join(str(value).split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
