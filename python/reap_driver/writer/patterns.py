"""Which modules a text in a quantizer's settings names, by the rules of the format.

Quantizers name modules in three ways. The beginning of a text, its characters and the quantizer say
which one it is:

a name              `model.layers.1.mlp.experts.3.up_proj`, or a part of one
a regular           `re:.*experts\\.3\\..*` (compressed-tensors), `-:.*gate$` (GPTQModel); without a
expression          mark in AutoRound and in transformers' own lists
a wildcard          `model.layers.1.mlp.experts.3*` (ModelOpt, Quark)
"""

import fnmatch
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from reap_kernels.errors import CheckpointError

MARKS = ("re:", "+:", "-:")
_SPECIAL = re.compile(r"[*?\[\](){}|^$+\\]")
_ONLY_REGULAR = re.compile(r"\\|\.\*|\.\+|[\^$|(){}]|\][*+]")
# Quantizers whose unmarked texts with special characters are wildcards. Those of others are regular
# expressions or were meant as wildcards, so both readings are evaluated.
_WILDCARDS = ("modelopt", "compressed-tensors", "quark")
# Quantizers whose readers search for a name anywhere in a module's name, so `experts.3` also
# matches `experts.30`.
_ANYWHERE = ("awq", "modelopt")
_LITERAL = re.compile(
    r"\^?(?:\.\*)?(?P<body>(?:[\w-]|\\?\.(?![*+?]))+)(?P<rest>\.\*\$?|\$)?", re.ASCII
)

Matcher = Callable[[str], bool]


@dataclass(frozen=True)
class Pattern:
    """One text.

    Attributes:
        text: as written.
        mark: "re:", "+:", "-:" or "".
        kind: "name", "regular expression", "wildcard" or "either" of the two.
        matchers: decide whether a module is named; several where the text can be read in several
            ways.
    """

    text: str
    mark: str
    kind: str
    matchers: tuple[Matcher, ...]

    @property
    def body(self) -> str:
        """The text after the mark."""
        return self.text[len(self.mark) :]

    @property
    def is_rooted(self) -> bool:
        """Whether the beginning of a name ("model.", "language_model.") matters for a match."""
        return "model" in self.body or not self.body.startswith((".*", "*"))

    def literal(self) -> str | None:
        """The name in the text if it is one literal name, perhaps with `.*` around it; its dots may
        be escaped. Else None.
        """
        if self.kind == "name":
            return self.body
        found = _LITERAL.fullmatch(self.body)
        return found["body"] if found and self.kind == "regular expression" else None


def read(text: str, method: str | None, where: str) -> Pattern:
    """Interprets a text as readers of a quantizer's settings do.

    Raises:
        CheckpointError: a marked text is not a regular expression that can be evaluated.
    """
    mark = next((m for m in MARKS if text.startswith(m)), "")
    body = text[len(mark) :]
    if mark:
        if _is_exponential(body):
            raise CheckpointError(
                f"{where}: the pattern {text!r} repeats a group that repeats or branches itself, "
                "which can take for ever to evaluate; write it without."
            )
        return Pattern(text, mark, "regular expression", (_regular(text, body, method, where),))
    if not _SPECIAL.search(body):
        # Where expressions are searched for, names are too: their dots are any character.
        search = _is_searched(method)
        matcher = _regular(text, body, method, where) if search else _named(body, method)
        return Pattern(text, mark, "name", (matcher,))
    wildcard = _wildcard(body)
    try:
        regular = _regular(text, body, method, where)
    except CheckpointError:
        return Pattern(text, mark, "wildcard", (wildcard,))
    if _is_exponential(body) or (method is not None and method.startswith(_WILDCARDS)):
        return Pattern(text, mark, "wildcard", (wildcard,))
    if _ONLY_REGULAR.search(body):
        return Pattern(text, mark, "regular expression", (regular,))
    return Pattern(text, mark, "either", (regular, wildcard))


def _regular(text: str, body: str, method: str | None, where: str) -> Matcher:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on syntax that a later Python may read differently
            compiled = re.compile(body)
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"{where}: the pattern {text!r} is not a regular expression ({error}); correct it."
        ) from error
    find = compiled.match  # from the beginning of the name, as most readers do
    if method == "torchao":
        find = compiled.fullmatch
    elif _is_searched(method):
        find = compiled.search
    return lambda name: find(name) is not None


def _is_searched(method: str | None) -> bool:
    """Whether readers search for an expression anywhere in a name."""
    return method is not None and ("auto-round" in method or method == "gemma")


def _is_exponential(body: str) -> bool:
    """Whether a regular expression repeats a group that repeats or branches itself, as `(x+)+`, so
    that matching may take exponential time.
    """
    opened: list[bool] = []  # for every open group: whether it repeats or branches
    plain = re.sub(r"\\.|\[[^\]]*\]", "x", body)
    for place, char in enumerate(plain):
        if char == "(":
            opened.append(False)
        elif char == ")" and opened:
            repeats = plain[place + 1 : place + 2] in ("*", "+", "{")
            inside = opened.pop()
            if inside and repeats:
                return True
            if opened and (inside or repeats):
                opened[-1] = True
        elif char in "*+{|" and opened:
            opened[-1] = True
    return False


def _wildcard(body: str) -> Matcher:
    compiled = re.compile(fnmatch.translate(body))
    return lambda name: compiled.match(name) is not None


def _named(body: str, method: str | None) -> Matcher:
    """Matches a name: the whole one for compressed-tensors; anywhere for AWQ and ModelOpt; else by
    whole segments, and for some quantizers also by its beginning and its end.
    """
    if method == "compressed-tensors":
        return lambda name: name == body
    if method is not None and method.startswith(_ANYWHERE):
        return lambda name: body in name
    inside = f".{body}."
    if method is None or method == "gptq":
        return lambda name: inside in f".{name}."
    return lambda name: inside in f".{name}." or name.startswith(body) or name.endswith(body)
