"""Rewrites texts that name experts by number: ignore lists, options by module, patterns.

A text is evaluated as readers of the format do, on the names of all experts before and after their
renumbering. A text that selects the same experts both times is kept. Otherwise its number is
replaced and the new text evaluated; if that fails, it is replaced by the names of the modules that
it selects. A text is written only if it is proved to select the same experts as before.
"""

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from reap_driver.model.expert_layout import ExpertLayout
from reap_driver.writer.actions import Copy, split_layer
from reap_driver.writer.keys import KeyActions
from reap_driver.writer.patterns import Matcher, Pattern, read
from reap_kernels.errors import CheckpointError

# Beginnings before `layers.3` of the names that other programs give the same modules.
_ROOTS = ("", "model.", "language_model.", "language_model.model.", "model.language_model.")
# Fields with names relative to a decoder layer: a text there cannot mean one layer only.
_RELATIVE = frozenset({"modules_in_block_to_quantize"})
# Usual names of the matrices of one expert, also where files have other names or stack them.
_USUAL_PARTS = (".gate_proj", ".up_proj", ".down_proj", ".gate_up_proj", ".w1", ".w2", ".w3")
# What a name refers to: an expert, one of its matrices, or a tensor of a matrix.
_LISTED, _MODULE, _TENSOR = 0, 1, 2


@dataclass(frozen=True)
class NumberedExperts:
    """Experts with numbers in their names, `<prefix><number><part>`.

    Attributes:
        prefix: up to the number, as on disk: "model.layers.3.mlp.experts.".
        number: old number of every kept expert -> new number.
        count: old numbers are below it.
        parts: what follows the number ("", ".up_proj", ".up_proj.weight"), and what that names.
        alias: the prefix by the module's name in memory.
    """

    prefix: str
    number: Mapping[int, int]
    count: int
    parts: Mapping[str, int] = field(default_factory=lambda: {"": _LISTED})
    alias: str | None = None

    @cached_property
    def tail(self) -> str:
        """The prefix from the stack of layers on: "layers.3.mlp.experts."."""
        root, rest = split_layer(self.prefix + "0.")
        return ".".join(root.split(".")[-3:]) + rest[: -len("0.")]

    @cached_property
    def numbers_after(self) -> frozenset[int]:
        """New numbers."""
        return frozenset(self.number.values())


_Chosen = tuple[int, int, str]  # list, number, part


@dataclass(frozen=True)
class _Selection:
    """The numbered experts and the other modules that a text selects."""

    variant: int  # how the experts' names are written
    experts: frozenset[_Chosen]
    others: frozenset[str]


class ExpertNames:
    """Rewrites the settings of one checkpoint.

    Args:
        lists: experts that names can number.
        others: names of the other modules.

    Example:
        >>> experts = NumberedExperts("model.layers.3.mlp.experts.", {0: 0, 4: 1}, 8)
        >>> ignore = ["lm_head", "model.layers.3.mlp.experts.4.up_proj"]
        >>> ExpertNames([experts]).rewrite(ignore, "config.json", None)
        ['lm_head', 'model.layers.3.mlp.experts.1.up_proj']
    """

    def __init__(self, lists: Sequence[NumberedExperts], others: Collection[str] = ()) -> None:
        self._lists, self._others = lists, sorted(others)
        self._prefixes = {experts.prefix for experts in lists}
        self._tails: dict[str, list[int]] = {}
        for place, experts in enumerate(lists):
            self._tails.setdefault(experts.tail, []).append(place)
        tails = "|".join(re.escape(tail).replace(r"\.", r"\\?\.") for tail in self._tails)
        self._tail = re.compile(rf"(?<![\w-])({tails})(\d+)(?!\d)" if tails else r"(?!)")
        names = [x.prefix + (x.alias or "") + "".join(x.parts) for x in lists]
        names += [*_ROOTS, *_USUAL_PARTS]
        self._words = {word for name in names for word in name.split(".")}

    def rewrite(self, value: Any, where: str, method: str | None) -> Any:
        """The same JSON value with experts renumbered and entries of removed experts dropped.

        Args:
            value: settings, or a part of them.
            where: names file and field in an error.
            method: the quantizer.

        Raises:
            CheckpointError: a text whose meaning cannot be kept.
        """
        if isinstance(value, dict):
            return self._mapping(value, where, method)
        if isinstance(value, list):
            return self._sequence(value, where, method)
        if isinstance(value, str):
            return self._scalar(value, where, method)
        return value

    def _mapping(self, value: dict[str, Any], where: str, method: str | None) -> dict[str, Any]:
        """Options by module: whole names come before patterns, patterns in their order."""
        names = {name: self._texts(name, where, method) for name in value}
        whole = {name for name in value if self._is_whole_name(name, where, method)}
        taken = {new for name in whole for new in names[name]}
        written: dict[str, Any] = {}
        for name, below in value.items():
            inner = self.rewrite(below, f"{where}.{name}", method)
            if name not in whole:
                if any(self._is_whole_name(new, where, method) for new in names[name]):
                    self._check_order(name, value, whole, where, method)
                names[name] = [n for n in names[name] if n not in taken and n not in written]
            written.update(dict.fromkeys(names[name], inner))
        return written

    def _is_whole_name(self, text: str, where: str, method: str | None) -> bool:
        """Whether a text is the whole name of something of one expert, which readers look up before
        patterns.
        """
        found = self._tail.search(text)
        if found is None or text[: found.end(1)] not in self._prefixes:
            return False
        return self._quick(read(text, method, where)) is not None

    def _check_order(
        self,
        name: str,
        value: Mapping[str, Any],
        whole: Collection[str],
        where: str,
        method: str | None,
    ) -> None:
        """A pattern may become whole names only where no other one with another value decides about
        the same modules.
        """
        own = self._readings(read(name, method, where))[0]
        decided = [
            f"{self._prefix(self._lists[place], own.variant)}{number}{part}"
            for place, number, part in own.experts
        ]
        for other, options in value.items():
            if options == value[name] or other in whole:
                continue
            if any(map(read(other, method, where).matchers[0], decided)):
                raise CheckpointError(
                    f"{where}: the patterns {name!r} and {other!r} decide about the same experts, "
                    "and their numbers change; write the entries out by layer and expert."
                )

    def _sequence(self, value: list[Any], where: str, method: str | None) -> list[Any]:
        """An ignore list and its like: what any of its texts names."""
        outcomes = self._outcomes([v for v in value if isinstance(v, str)], where, method)
        written = (
            outcomes[v] if isinstance(v, str) else [self.rewrite(v, where, method)] for v in value
        )
        return list(itertools.chain.from_iterable(written))

    def _outcomes(
        self, texts: Sequence[str], where: str, method: str | None
    ) -> dict[str, list[str]]:
        """{text: the texts that replace it}, for the texts of one list: itself, others, or none if
        it names only removed experts.
        """
        outcomes: dict[str, list[str]] = {}
        pending: dict[str, tuple[Pattern, list[_Selection]]] = {}
        for text in dict.fromkeys(texts):
            pattern = read(text, method, where)
            quick = self._quick(pattern)
            selections = self._readings(pattern) if quick is None else []
            if quick is not None:
                outcomes[text] = quick
            elif all(self._after(s.experts) == self._present(s.experts) for s in selections):
                outcomes[text] = self._remaining(text, selections)
            else:
                pending[text] = (pattern, selections)
        together = self._stay_together([ways for _, ways in pending.values()])
        for text, (pattern, selections) in pending.items():
            outcomes[text] = (
                self._remaining(text, selections)
                if together
                else self._changed(pattern, selections, where, method)
            )
        return outcomes

    def _remaining(self, text: str, selections: list[_Selection]) -> list[str]:
        """A text that is kept, unless it named experts and all of them are removed."""
        named = any(s.experts for s in selections)
        left = any(self._present(s.experts) or s.others for s in selections)
        return [text] if left or not named else []

    def _stay_together(self, readings: list[list[_Selection]]) -> bool:
        """Whether texts select the same experts together, though not one by one: together they name
        every expert of every layer by its number.
        """
        if len({ways[0].variant for ways in readings}) != 1 or any(len(w) > 1 for w in readings):
            return False
        whole = frozenset(itertools.chain.from_iterable(ways[0].experts for ways in readings))
        return self._after(whole) == self._present(whole)

    def _scalar(self, value: str, where: str, method: str | None) -> str:
        """Rewrites one text, or several with commas between."""
        parts = value.split(",")
        written = [new for part in parts for new in self._texts(part, where, method)]
        if not written:
            raise CheckpointError(f"{where}: {value!r} names removed experts alone; correct it.")
        return value if written == parts else ",".join(written)

    def _texts(self, text: str, where: str, method: str | None) -> list[str]:
        """The texts that replace a text that stands alone."""
        return self._outcomes([text], where, method)[text]

    def _changed(
        self, pattern: Pattern, selections: list[_Selection], where: str, method: str | None
    ) -> list[str]:
        """The texts that replace one that would select other experts after the renumbering."""
        renumbered = self._renumber(pattern, selections, where, method)
        if renumbered is not None:
            return renumbered
        if len(selections) > 1 or _RELATIVE & set(re.split(r"[.:\[ ]", where)):
            why = (
                "can be read as a wildcard and as a regular expression, which name different ones"
                if len(selections) > 1
                else "names experts relative to a layer, though each layer keeps others"
            )
            raise CheckpointError(
                f"{where}: the entry {pattern.text!r} names experts by number and {why}; "
                "write it out by layer and expert."
            )
        return self._spell(pattern, selections[0], where, method)

    def _quick(self, pattern: Pattern) -> list[str] | None:
        """The replacement of a text that is one literal name, without evaluating it; None if it is
        not one, or may select more than that name.
        """
        literal = pattern.literal()
        if literal is None:
            return None
        found = self._tail.search(pattern.text)
        if found is None:
            return None if self._may_name(literal) else [pattern.text]
        behind = pattern.text[found.end() :]
        if not re.match(r"\\?\.\w|\$|\\\.", behind) and not (
            pattern.kind == "name" and not behind and self._is_whole(pattern)
        ):
            return None
        number = self._number(pattern, found)
        if number is None:
            return None
        new = number.get(int(found[2]))
        if new is None:
            return []
        return [pattern.text[: found.start(2)] + str(new) + behind]

    def _may_name(self, literal: str) -> bool:
        """Whether a part of a name, perhaps cut inside its first and its last word, can be part of
        the name of an expert and contain a number.
        """
        parts = literal.replace("\\", "").split(".")
        first, *rest = parts
        middle, last = rest[:-1], rest[-1:] or [first]
        return (
            any(part.isdigit() for part in parts)
            and not all(part.isdigit() for part in parts)
            and all(part.isdigit() or part in self._words for part in middle)
            and (first.isdigit() or any(word.endswith(first) for word in self._words))
            and (last[0].isdigit() or any(word.startswith(last[0]) for word in self._words))
        )

    def _is_whole(self, pattern: Pattern) -> bool:
        """Whether a name selects only itself, not also names that begin with it."""
        return not pattern.matchers[0](pattern.body + "0")

    def _number(self, pattern: Pattern, found: re.Match[str]) -> Mapping[int, int] | None:
        """New numbers of the list that a name belongs to: of the lists with this tail, the one
        whose root agrees best with the beginning of the name; None if several do.
        """
        places = self._tails[found[1].replace("\\", "")]
        before = pattern.text[: found.start()].replace("\\", "").split(".")
        roots = [
            self._lists[place].prefix.removesuffix(self._lists[place].tail).split(".")
            for place in places
        ]
        scores = [_common_end(root, before) for root in roots]
        best = [p for p, score in zip(places, scores, strict=True) if score == max(scores)]
        numbers = [self._lists[place].number for place in best]
        return numbers[0] if all(number == numbers[0] for number in numbers) else None

    def _readings(self, pattern: Pattern) -> list[_Selection]:
        """What a text selects, for every way to read it; ways that agree count once."""
        found = [self._select(pattern, matcher) for matcher in pattern.matchers]
        return found[:1] if all(s == found[0] for s in found) else found

    def _select(self, pattern: Pattern, matches: Matcher) -> _Selection:
        """Evaluates a text on every name. Names of experts are tried as on disk, then as in memory,
        then with another root, then with the usual names of the matrices of an expert.
        """
        others = frozenset(name for name in self._others if matches(name))
        variants = [0, 1] if any(experts.alias for experts in self._lists) else [0]
        roots = range(2, 2 + len(_ROOTS)) if pattern.is_rooted else ()
        parts = [(v, False) for v in (*variants, *roots)] + [(v, True) for v in variants]
        for variant, usual in parts:
            experts = frozenset(
                (place, number, part)
                for place, experts in enumerate(self._lists)
                for prefix in (self._prefix(experts, variant),)
                for number in _numbers(pattern, experts)
                for part in (_USUAL_PARTS if usual else experts.parts)
                if matches(f"{prefix}{number}{part}")
            )
            if experts:
                return _Selection(variant, experts, others)
        return _Selection(0, frozenset(), others)

    def _prefix(self, experts: NumberedExperts, variant: int) -> str:
        """The prefix in one way of writing it."""
        if variant < 2:
            return (experts.alias if variant else None) or experts.prefix
        return _ROOTS[variant - 2] + experts.tail

    def _after(self, chosen: frozenset[_Chosen]) -> frozenset[_Chosen]:
        """The kept experts among those selected, by their new numbers."""
        return frozenset(
            (place, self._lists[place].number[old], part)
            for place, old, part in chosen
            if old in self._lists[place].number
        )

    def _present(self, chosen: frozenset[_Chosen]) -> frozenset[_Chosen]:
        """What the same text selects after the renumbering."""
        return frozenset(c for c in chosen if c[1] in self._lists[c[0]].numbers_after)

    def _renumber(
        self, pattern: Pattern, selections: list[_Selection], where: str, method: str | None
    ) -> list[str] | None:
        """The text with its one number replaced, or dropped; None if that does not select the same
        experts.
        """
        moved = [s for s in selections if self._after(s.experts) != self._present(s.experts)]
        olds = {old for s in moved for _, old, _ in s.experts}
        news = {new for s in moved for _, new, _ in self._after(s.experts)}
        if not news and moved == selections and not any(s.others for s in selections):
            return []
        if len(news) != 1 or len(olds) != 1:
            return None
        runs = list(re.finditer(rf"(?<!\d){olds.pop()}(?!\d)", pattern.text))
        for run in runs:
            text = pattern.text[: run.start()] + str(next(iter(news))) + pattern.text[run.end() :]
            try:
                again = self._readings(read(text, method, where))
            except CheckpointError:
                continue
            if len(again) == len(selections) and all(
                self._after(s.experts) == self._present(t.experts) and s.others == t.others
                for s, t in zip(selections, again, strict=True)
            ):
                return [text]
        return None

    def _spell(
        self, pattern: Pattern, selection: _Selection, where: str, method: str | None
    ) -> list[str]:
        """The names of everything that a text selects, with new numbers."""
        kinds = {c: self._lists[c[0]].parts.get(c[2], _MODULE) for c in selection.experts}
        of = next(k for k in (_MODULE, _TENSOR, _LISTED) if k in kinds.values())
        chosen = frozenset(c for c, kind in kinds.items() if kind == of)
        after = sorted(self._after(chosen))
        names = [
            f"{self._prefix(self._lists[place], selection.variant)}{new}{part}"
            for place, new, part in after
        ]
        if pattern.mark in ("+:", "-:"):
            names = [f"{pattern.mark}^{re.escape(name)}$" for name in names]
        proved = self._is_proved([read(name, method, where) for name in names], after, selection)
        others = sorted(selection.others)
        if pattern.mark in ("+:", "-:"):
            others = [f"{pattern.mark}^{re.escape(name)}$" for name in others]
        names += others
        if not proved or not names:
            raise CheckpointError(
                f"{where}: the entry {pattern.text!r} names experts by number in a way that cannot "
                "be rewritten; write it out by layer and expert."
            )
        return names

    def _is_proved(
        self, names: Sequence[Pattern], after: Sequence[_Chosen], selection: _Selection
    ) -> bool:
        """Whether names, each of one selected part, select exactly the intended matrices of their
        experts, also by their names on disk if the text selected those.
        """
        meant = self._after(selection.experts)
        written: dict[tuple[int, int], list[Pattern]] = {}
        for name, (place, number, _) in zip(names, after, strict=True):
            written.setdefault((place, number), []).append(name)
        for (place, number), patterns in written.items():
            parts = [p for p, kind in self._lists[place].parts.items() if kind == _MODULE]
            for variant in {0, selection.variant}:
                stem = f"{self._prefix(self._lists[place], variant)}{number}"
                for part in parts:
                    selects = any(name.matchers[0](stem + part) for name in patterns)
                    wanted = variant == selection.variant and (place, number, part) in meant
                    if selects != wanted:
                        return False
        return True


def _numbers(pattern: Pattern, experts: NumberedExperts) -> Sequence[int]:
    """Numbers that a text can select: only 3 for a name with that number, `experts.3.up_proj`."""
    last = re.escape(experts.prefix.split(".")[-2])
    said = re.search(rf"(?:^|\.){last}\.(\d+)\.", pattern.body) if pattern.kind == "name" else None
    return range(experts.count) if said is None else [int(said[1])]


def _common_end(left: Sequence[str], right: Sequence[str]) -> int:
    """Length of the longest common ending."""
    pairs = zip(reversed(left), reversed(right), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def numbered_experts(
    keys: KeyActions, layout: ExpertLayout, kept: Mapping[str, Sequence[int]]
) -> list[NumberedExperts]:
    """Experts that names can number: those in lists on disk, and those of layers that are stacked.

    Args:
        keys: the decided actions.
        layout: the model's.
        kept: kept ids of each layer, ascending.
    """
    lists = []
    for prefix, experts in keys.lists.items():
        number: dict[int, int] = {}
        parts = {"": _LISTED}
        for key, index in experts.keys.items():
            action = keys.actions[key]
            if isinstance(action, Copy):
                number[index] = int(action.name[len(prefix) :].partition(".")[0])
            tensor = "." + key[len(prefix) :].partition(".")[2]
            parts[tensor.rpartition(".")[0].removesuffix(".weight")] = _MODULE
            parts[tensor] = _TENSOR
        count = max(experts.keys.values()) + 1
        alias = experts.layers[0] + "." if len(experts.layers) == 1 else None
        if alias is not None and prefix.startswith(alias):
            alias = None  # the prefix itself, or that of one projection
        lists.append(NumberedExperts(prefix, number, count, parts, alias))
    named = {experts.alias or experts.prefix for experts in lists}
    for layer in sorted(layout.layers):
        if layer + "." not in named:
            number = {old: new for new, old in enumerate(kept[layer])}
            parts = {"": _LISTED, **dict.fromkeys(_USUAL_PARTS, _MODULE)}
            lists.append(NumberedExperts(layer + ".", number, layout.counts[layer], parts))
    return lists


def other_modules(keys: KeyActions) -> set[str]:
    """Modules with tensors on disk that are in no list of experts."""
    listed = {key for experts in keys.lists.values() for key in experts.keys}
    return {key.rpartition(".")[0] for key in keys.actions if key not in listed}
