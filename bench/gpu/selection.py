"""What a run of `bench.gpu` may be narrowed to: shapes, lengths, routing, rounds, sequences."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

from reap_kernels.testing import Case

ROUTINGS = ("balanced", "zipf")


@dataclass(frozen=True)
class Selection:
    """Nothing chosen is what a stage plans itself.

    Attributes:
        shapes: published shapes, in this order.
        tokens: of a layer call.
        routing: of `ROUTINGS`.
        rounds: how often a stage takes its providers in turn.
        sequences: of the whole model.
    """

    shapes: tuple[Case, ...] = ()
    tokens: tuple[int, ...] = ()
    routing: tuple[str, ...] = ()
    rounds: int | None = None
    sequences: int | None = None

    def cases(self, planned: Sequence[Case]) -> list[Case]:
        """The planned layer calls, or all of the chosen ones: lengths of a shape, then the next."""
        if not (self.shapes or self.tokens or self.routing):
            return list(planned)
        every = [replace(case, tokens=0, skew="") for case in planned]
        shapes = self.shapes or tuple(dict.fromkeys(every))
        tokens = self.tokens or tuple(dict.fromkeys(case.tokens for case in planned))
        routing = self.routing or tuple(dict.fromkeys(case.skew for case in planned))
        return [
            replace(shape, tokens=number, skew=skew)
            for shape in shapes
            for number in tokens
            for skew in routing
        ]


PLANNED = Selection()


def add(parser: argparse.ArgumentParser) -> None:
    """The options."""
    what = parser.add_argument_group(
        "what is timed",
        "shapes, tokens and routing: of the stages kernels, layer, gram, steps, short and "
        "products, and of the queue's items layers, products, short calls, steps, FP8 time and "
        "gram time; rounds: of these, of end2end, and of the items end to end and norm time; "
        "sequences: of end2end and profile, as stages or items",
    )
    what.add_argument("--shapes", help=f"comma-separated, of {', '.join(_names())}")
    what.add_argument("--tokens", help="of a layer call, comma-separated, such as 2048,16384")
    what.add_argument("--routing", help=f"comma-separated, of {', '.join(ROUTINGS)}")
    what.add_argument("--rounds", help="how often providers are taken in turn, at least 1")
    what.add_argument("--sequences", help="of 2,048 tokens, for the whole model, at least 1")


def of(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Selection:
    """What was chosen; ends the program where a value is none that can be."""
    from bench.gpu.layer import SHAPES

    known = {shape.name: shape for shape in SHAPES}
    chosen = {}
    for name, choices in (("shapes", tuple(known)), ("routing", ROUTINGS)):
        own = _listed(getattr(options, name))
        wrong = [value for value in own if value not in choices]
        if wrong or (getattr(options, name) is not None and not own):
            parser.error(f"--{name} takes {', '.join(choices)}; got {', '.join(wrong) or 'none'}")
        chosen[name] = own
    tokens = [_count(parser, "tokens", value) for value in _listed(options.tokens)]
    if options.tokens is not None and not tokens:
        parser.error("--tokens takes whole numbers of 1 or more; got none")
    rest = {
        name: None
        if getattr(options, name) is None
        else _count(parser, name, getattr(options, name))
        for name in ("rounds", "sequences")
    }
    shapes = tuple(known[name] for name in chosen["shapes"])
    return Selection(shapes, tuple(tokens), chosen["routing"], **rest)


def _names() -> list[str]:
    from bench.gpu.layer import SHAPES

    return [shape.name for shape in SHAPES]


def _listed(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def _count(parser: argparse.ArgumentParser, name: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or not int(text):
        parser.error(f"--{name} takes whole numbers of 1 or more; got {text}")
    return int(text)
