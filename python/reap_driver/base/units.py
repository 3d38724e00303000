"""Formats numbers for people to read."""

import math
import re
import textwrap

COLUMNS = 80
_NAMES = 12  # columns of the names of rows


def in_bytes(nbytes: float) -> str:
    """Bytes with three significant digits, in powers of 1000: 1_030_000_000_000 is 1.03 TB."""
    return _in_units(nbytes, "B")


def in_operations(flops: float) -> str:
    """Floating-point operations, the same way: 12_500_000_000_000_000 are 12.5 PFLOP."""
    return _in_units(flops, "FLOP")


def _in_units(number: float, unit: str) -> str:
    """A number with three significant digits and its unit, in powers of 1000."""
    size, prefixes = float(number), ["", "k", "M", "G", "T", "P", "E"]
    while size >= 999.5 and len(prefixes) > 1:
        size, prefixes = size / 1000, prefixes[1:]
    digits = 0 if size >= 99.95 or not prefixes[0] else 1 if size >= 9.995 else 2
    return f"{size:.{digits}f} {prefixes[0]}{unit}"


def short(number: float, letters: str = "kMGTPE") -> str:
    """Three significant digits and a suffix: 1_234_567 is 1.23M.

    Args:
        number: not negative.
        letters: suffixes of the powers of 1000; "kMBT" for parameters.
    """
    power = 0
    while number >= 999.5 and power < len(letters):
        number, power = number / 1000, power + 1
    return f"{number:.3g}{letters[power - 1] if power else ''}"


def significant(number: float, digits: int = 4) -> str:
    """A number with so many significant digits, and never fewer than its whole part has.

    Example:
        >>> significant(0.01), significant(10.5), significant(2293.4), significant(123456.7)
        ('0.01000', '10.50', '2293', '123457')
    """
    if math.isfinite(number) and abs(number) >= 10 ** (digits - 1):
        return f"{number:.0f}"
    return f"{number:#.{digits}g}".removesuffix(".")


def row(name: str, text: str, names: int = _NAMES) -> str:
    """A row of a report: a name, padded to a column, and a text, in lines of 80 columns."""
    # A number and its unit stay together.
    kept = re.sub(r"(?<=\d) (?=[kMGTPE]?(B|FLOP)\b)", "\xa0", text)
    lines = textwrap.fill(
        kept,
        COLUMNS,
        initial_indent=name.ljust(names),
        subsequent_indent=" " * names,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return lines.replace("\xa0", " ")


def clock(seconds: float) -> str:
    """75 as 1:15, 4000 as 1:06:40; from a day on in days and hours: 975_600 as 11 days 7 h."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
    days, hour = divmod(round(seconds / 3600), 24)
    return f"{days} day{'s' if days > 1 else ''}" + (f" {hour} h" if hour else "")


def took(seconds: float) -> str:
    """How long something took: 12.34 as 12.3 s, from a minute on as `clock` has it."""
    return f"{seconds:.1f} s" if seconds < 60 else clock(seconds)
