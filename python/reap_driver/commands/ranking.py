"""Options that say how many experts go, and which, for the commands that rank."""

import argparse

from reap_driver.criteria import CRITERIA


def add_ranking(parser: argparse.ArgumentParser) -> None:
    """How many experts go, and which."""
    group = parser.add_argument_group("which experts go")
    group.add_argument(
        "--ratio",
        type=float,
        default=0.5,
        help="share of each layer's experts to remove, above 0 and below 1 (default: %(default)s)",
    )
    group.add_argument(
        "--criterion",
        choices=tuple(CRITERIA),
        default="reap",
        metavar="NAME",
        help="what experts are ranked by (default: %(default)s); one of "
        + "; ".join(f"{name}: {c.formula}" for name, c in CRITERIA.items()),
    )
    group.add_argument(
        "--weights",
        type=weights,
        metavar="GROUP=W,...",
        help="count the groups as if their tokens had these shares (default: as observed)",
    )


def weights(text: str) -> dict[str, float]:
    """GROUP=NUMBER, separated by commas."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = part.rpartition("=")
        try:
            found[name] = float(number)
        except ValueError:
            equals = ""
        if not equals or not name:
            raise argparse.ArgumentTypeError(f"{part!r} is not GROUP=NUMBER, such as code=0.7")
    return found
