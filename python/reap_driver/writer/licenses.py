"""The license of a model in words, from the metadata of its card."""

from collections.abc import Mapping, Sequence
from typing import Any

from reap_driver.writer.markdown import Markdown, code, text

# Identifiers of the hub that models use -> the name of the license.
_NAMES = {
    "afl-3.0": "Academic Free License 3.0",
    "agpl-3.0": "GNU Affero General Public License 3.0",
    "apache-2.0": "Apache License 2.0",
    "artistic-2.0": "Artistic License 2.0",
    "bigcode-openrail-m": "BigCode OpenRAIL-M 1",
    "bigscience-bloom-rail-1.0": "BigScience BLOOM RAIL 1.0",
    "bigscience-openrail-m": "BigScience OpenRAIL-M",
    "bsd-2-clause": "BSD 2-Clause License",
    "bsd-3-clause": "BSD 3-Clause License",
    "bsl-1.0": "Boost Software License 1.0",
    "cc-by-4.0": "Creative Commons Attribution 4.0",
    "cc-by-nc-4.0": "Creative Commons Attribution Non-Commercial 4.0",
    "cc-by-nc-nd-4.0": "Creative Commons Attribution Non-Commercial No Derivatives 4.0",
    "cc-by-nc-sa-4.0": "Creative Commons Attribution Non-Commercial Share Alike 4.0",
    "cc-by-nd-4.0": "Creative Commons Attribution No Derivatives 4.0",
    "cc-by-sa-4.0": "Creative Commons Attribution Share Alike 4.0",
    "cc0-1.0": "Creative Commons Zero 1.0",
    "creativeml-openrail-m": "CreativeML OpenRAIL-M",
    "gemma": "Gemma Terms of Use",
    "gpl-3.0": "GNU General Public License 3.0",
    "lgpl-3.0": "GNU Lesser General Public License 3.0",
    "llama2": "Llama 2 Community License",
    "llama3": "Llama 3 Community License",
    "llama3.1": "Llama 3.1 Community License",
    "llama3.2": "Llama 3.2 Community License",
    "llama3.3": "Llama 3.3 Community License",
    "llama4": "Llama 4 Community License",
    "mit": "MIT License",
    "mpl-2.0": "Mozilla Public License 2.0",
    "openrail": "OpenRAIL",
}


def license_words(inherited: Mapping[str, Any], files: Sequence[str]) -> Markdown | None:
    """The license that a card's metadata name; None where they name none.

    Args:
        inherited: fields of the card: `license`, `license_name` and `license_link`.
        files: names of files with the license's text, beside the weights.

    Example:
        >>> license_words({"license": "mit"}, [])
        'MIT License (`mit`)'
    """
    given = inherited.get("license")
    known = [given] if isinstance(given, str) else list(given or [])
    own = inherited.get("license_name")
    if own is not None and len(known) <= 1:
        words = f"{text(own)} ({code(known[0])})" if known else text(own)
    else:
        words = ", ".join(
            f"{_NAMES[one]} ({code(one)})" if one in _NAMES else text(one) for one in known
        )
    if not words:
        return None
    link = inherited.get("license_link")
    where = [*map(code, files), *([code(link)] if isinstance(link, str) else [])]
    places = f"; its text: {', '.join(dict.fromkeys(where))}" if where else ""
    return Markdown(words + places)
