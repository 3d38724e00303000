"""The table of formats of other tools, from the table of the code."""

from reap_driver.interchange.formats import FORMATS, ForeignFormat

_HOLDS = {
    "stats": "statistics",
    "plan": "a plan",
    "ranking": "a ranking of all experts",
    "counts": "rows of each expert",
    "placement": "a placement on devices",
    "bits": "bits of each expert",
}


def render() -> str:
    """A row per format: what it holds, which ways it goes, and what that needs besides."""
    lines = ["| format | file | holds | read | written from |", "|---|---|---|---|---|"]
    for one in FORMATS.values():
        read = "with `--model`" if one.reads else "no"
        cells = (f"`{one.name}`", one.what, _HOLDS[one.holds], read, _written(one))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _written(one: ForeignFormat) -> str:
    """What a format is written from, with the options that it takes and those it needs."""
    if not one.writes:
        return "no"
    more = [f"`--{name}`" for name in one.needs]
    may = [f"`--{name}`" for name in one.options if name not in one.needs]
    text = _HOLDS[one.made_from]
    text += f" with {' and '.join(more)}" if more else ""
    return text + (f"; may have {' and '.join(may)}" if may else "")
