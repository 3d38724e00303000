"""Reads numbers as people write them: sizes in bytes, counts and rates, with prefixes of units."""

import re

_PREFIXES = "kmgtp"


def number(text: str, unit: str = "") -> float | None:
    """The value of a text such as "5GB", "1.5 GiB", "24M" or "2GB/s"; None if it is none.

    Args:
        text: a decimal number, a prefix or none, and a unit or none. The prefixes k, M, G, T and P
            are powers of 1000; Ki, Mi, Gi, Ti and Pi powers of 1024. Case does not matter.
        unit: regular expression of the unit. A text may leave it out where it has a prefix; with
            neither it is none, as 16 is taken for 16 GB more often than for 16 bytes.

    Example:
        >>> number("1.5kB", "B"), number("2 Gi", "B"), number("16", "B"), number("16")
        (1500.0, 2147483648.0, None, 16.0)
    """
    pattern = rf"(\d+(?:\.\d+)?)\s*(?:([{_PREFIXES}])(i?))?(?:{unit})?"
    match = re.fullmatch(pattern, text.strip(), re.IGNORECASE | re.ASCII)
    if match is None or (unit and match[0] == match[1]):
        return None
    power = _PREFIXES.index(match[2].lower()) + 1 if match[2] else 0
    return float(match[1]) * (1024 if match[3] else 1000) ** power


def whole(text: str, unit: str = "") -> int | None:
    """The same where it is a whole number above 0, else None.

    Example:
        >>> whole("24M"), whole("1.5")
        (24000000, None)
    """
    value = number(text, unit)
    return None if value is None or value < 1 or value != int(value) else int(value)
