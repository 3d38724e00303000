"""The plan: which experts each layer keeps, and which neurons of them, and its JSON file."""

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from reap_driver.base.arguments import typed
from reap_driver.base.json_text import json_in_lines
from reap_driver.base.units import in_bytes
from reap_driver.planning.neurons import (
    MAX_WIDTH,
    Neurons,
    check_neurons,
    from_bitmap,
    to_bitmap,
)
from reap_kernels.documents import Format
from reap_kernels.errors import PlanError
from reap_kernels.files import replaced
from reap_kernels.model_match import DECIDING
from reap_kernels.provenance import MAX_EXPERTS, MODEL, OBSERVED, SOURCE
from reap_kernels.schema import (
    Anything,
    Int,
    Kind,
    ListOf,
    MapOf,
    OrNull,
    Real,
    Record,
    Text,
    short,
)

_IDS = ListOf(Int(0, MAX_EXPERTS - 1))
_LAYER: dict[str, Kind] = {"num_experts": Int(1, MAX_EXPERTS), "kept": _IDS, "removed": _IDS}
# Of a layer whose experts lose neurons: I before the cut, and a bitmap per kept expert.
_WIDTH: dict[str, Kind] = {"width": Int(1, MAX_WIDTH), "neurons": ListOf(Text(MAX_WIDTH))}
NORMALIZE_KEY = "normalise"  # of `make_plan(normalize=)` in plan files, whose spelling stays
_SETTINGS: dict[str, Kind] = {
    NORMALIZE_KEY: Text(choices=("mean", "max", "none")),
    "layer_ratios": MapOf(Real(low=0, below=1)),
    "protected": MapOf(_IDS),
    # What was given in place of a ratio: a number of experts, or bytes and tokens.
    "keep": Int(1, MAX_EXPERTS),
    **dict.fromkeys(("target_size", "fits", "context"), Int(1)),
    # Of plans that remove neurons: the shape that was asked for ("auto", "96x512"), what the width
    # is a multiple of, and the ridge of the compensation.
    "shape": Text(100),
    "width_multiple": Int(1, MAX_WIDTH),
    "ridge": Real(low=0),
}
_FIELDS: dict[str, Kind] = {
    "model": MODEL,
    "criterion": Text(1000),
    "weights": OrNull(MapOf(Real(low=0))),
    "allocation": Text(1000),
    "ratio": Real(above=0, below=1),
    "scores_digest": Text(1000),
    "data": ListOf(SOURCE),
    "notes": ListOf(Text()),
}
_IF_ANY = (
    "settings",
    "run",
    "observed",
    "matrices",
)  # fields that a file holds unless they are empty
FORMAT = Format(
    "reap-plan",
    1,
    "plan",
    {**_FIELDS, "layers": MapOf(Record(_LAYER, _WIDTH), 1)},
    PlanError,
    "make it again with `reap-kernels plan`",
    {
        "settings": Record(optional=_SETTINGS),
        "run": MapOf(Anything()),
        "observed": OBSERVED,
        "matrices": Record({"digest": Text(100)}),
    },
)


@dataclass(frozen=True)
class LayerPlan:
    """Which experts of one layer are kept and which are removed, and the neurons of those kept.

    Attributes:
        num_experts: E.
        kept, removed: ids, ascending; together each of 0..E - 1 once. `kept` is not empty.
        width: I, the neurons of an expert (the size between its projections); None in a plan that
            removes whole experts only.
        neurons: per kept expert, in the order of `kept`, the ids of the neurons that it keeps,
            ascending in 0..I - 1; equally many of each. None where `width` is.

    Raises:
        PlanError: the ids are not as above.

    Example:
        >>> rd.LayerPlan.keeping(4, kept=(0, 2)).removed
        (1, 3)
        >>> rd.LayerPlan.keeping(4, (0, 2), width=3, neurons=((0, 1), (1, 2))).narrow_width
        2
    """

    num_experts: int
    kept: tuple[int, ...]
    removed: tuple[int, ...]
    width: int | None = None
    neurons: Neurons | None = None

    def __post_init__(self) -> None:
        if type(self.num_experts) is not int:
            raise PlanError(f"num_experts is {short(self.num_experts)}; give a whole number")
        for name in ("kept", "removed"):
            ids = getattr(self, name)
            if not isinstance(ids, tuple | list) or any(type(expert) is not int for expert in ids):
                raise PlanError(f"{name} holds other things than expert ids: {short(ids)}")
            if any(a >= b for a, b in itertools.pairwise(ids)):
                raise PlanError(f"{name} is not ascending without repetition: {short(ids)}")
        if not self.kept:
            raise PlanError("kept is empty; a layer needs experts")
        ids = sorted([*self.kept, *self.removed])
        if len(ids) != self.num_experts or ids != list(range(len(ids))):
            raise PlanError(
                f"kept {short(self.kept)} and removed {short(self.removed)} do not share out the "
                f"ids 0..{self.num_experts - 1}"
            )
        if (self.width is None) != (self.neurons is None):
            given, missing = ("width", "neurons") if self.neurons is None else ("neurons", "width")
            raise PlanError(f"{given} is given without {missing}; give both or neither")
        if self.neurons is not None:
            check_neurons(self.width, self.neurons, len(self.kept))

    @classmethod
    def keeping(
        cls,
        num_experts: int,
        kept: tuple[int, ...],
        width: int | None = None,
        neurons: Neurons | None = None,
    ) -> "LayerPlan":
        """The plan that keeps `kept`, of them `neurons`, and removes the rest."""
        stays = set(kept)
        removed = tuple(e for e in range(num_experts) if e not in stays)
        return cls(num_experts, kept, removed, width, neurons)

    @property
    def narrow_width(self) -> int | None:
        """I', the neurons that each kept expert keeps; None where the plan leaves the width."""
        return None if self.neurons is None else len(self.neurons[0])


def deciding_facts(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The facts that another model must share for a plan to apply to it, as in `Plan.model`, and
    `mtp` of multi-token-prediction layers.

    Args:
        layers: facts of each layer, as the provenance of statistics records them.
    """
    return {
        name: {fact: facts[fact] for fact in (*DECIDING, "mtp") if fact in facts}
        for name, facts in layers.items()
    }


@dataclass(frozen=True, repr=False)
class Plan:
    """Which experts every layer keeps, and how that was decided.

    Attributes:
        model: of the model it was made for: `id`, `config_digest`, `model_type`, `architecture`,
            the fields of its configuration that the digest covers (`config`), and how each layer
            routes and its sizes (`layers`). Older plans lack the last two.
        criterion: what ranked the experts.
        allocation: how the number of removed experts was divided among layers.
        ratio: share of experts that was asked to be removed, in (0, 1).
        layers: {name of the experts module: its plan}. A layer that is not named keeps all its
            experts.
        scores_digest: `Scores.digest()` of the scores.
        weights: {calibration group: share of the tokens}; None: as observed.
        data: of the calibration data, one entry per source.
        notes: sentences for a reader, for instance about rounding.
        settings: further options of the allocation, as far as they were used: `protected`
            {layer: ids}, `layer_ratios` {layer: ratio}, `normalise` (`make_plan(normalize=)`); and
            what was asked for in place of a ratio: `keep` (experts of every layer), `target_size`
            (bytes of the weight files), `fits` (bytes of memory) with `context` (tokens).
        run: what the command asked for that made it, in one run from the model on (`prune`,
            `search`); empty for other plans.
        observed: how the statistics were made: `device`, `devices`, `memory_bytes`, `threads`,
            `seconds`, and the `seed` of the samples; empty where they do not record it.
        matrices: `digest` of the folder of matrices that has the plan's new down projections, which
            compensate for what it removes; empty where the kept experts stay as they are.
        version: of the file format.

    Example:
        >>> plan = rd.Plan.load("plan.json")
        >>> plan.criterion, plan.ratio, plan.uniform
        ('reap', 0.25, True)
    """

    model: dict[str, Any]
    criterion: str
    allocation: str
    ratio: float
    layers: dict[str, LayerPlan]
    scores_digest: str
    weights: dict[str, float] | None = None
    data: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    observed: dict[str, Any] = field(default_factory=dict)
    matrices: dict[str, Any] = field(default_factory=dict)
    version: int = FORMAT.version

    def describe(self) -> str:
        """The plan in a line, for people."""
        layers = self.layers.values()
        held = sum(len(ids) for ids in self.settings.get("protected", {}).values())
        tail = f"; {held} of them protected" if held else ""
        tail += f" (ratio {self.ratio:g})" if self.asked else ""
        if self.uniform:
            counts = {(layer.num_experts, len(layer.kept)) for layer in layers}
            each = " and ".join(f"{kept} of {experts}" for experts, kept in sorted(counts))
            text = f"keeps {each} experts in each of {len(layers)} layers{self._widths()}"
            return f"plan by {self.criterion}: {text}{tail}"
        kept = [len(layer.kept) for layer in layers]
        experts = sum(layer.num_experts for layer in layers)
        return (
            f"plan by {self.criterion}, {self.allocation}: keeps {sum(kept)} of {experts} experts, "
            f"from {min(kept)} to {max(kept)} in each of {len(layers)} layers"
            f"{self._widths()}{tail}"
        )

    def _widths(self) -> str:
        """What it leaves of the experts' width, in words; empty where it leaves all."""
        found = sorted(set(self.widths.values()))
        each = " and ".join(f"{narrow} of {width}" for width, narrow in found)
        return f", with {each} neurons of each" if each else ""

    def __repr__(self) -> str:
        return f"Plan: {self.describe()}"

    @property
    def uniform(self) -> bool:
        """Whether all layers with equally many experts keep equally many."""
        counts = {(layer.num_experts, len(layer.kept)) for layer in self.layers.values()}
        return len(counts) == len({experts for experts, _ in counts})

    @property
    def narrows(self) -> bool:
        """Whether it removes neurons of experts that it keeps."""
        return any(layer.neurons is not None for layer in self.layers.values())

    @property
    def compensates(self) -> bool:
        """Whether kept experts get new down projections: it is used with its matrices only."""
        return self.narrows or bool(self.matrices)

    @property
    def shape(self) -> str | None:
        """Experts x neurons that each layer keeps, such as "96x512"; None where it removes whole
        experts only, or where layers differ.
        """
        shapes = {(len(layer.kept), layer.narrow_width) for layer in self.layers.values()}
        [(experts, neurons), *others] = shapes
        return None if others or neurons is None else f"{experts}x{neurons}"

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """Layer that says which neurons of its experts stay -> their number before and after."""
        return {
            name: (layer.width, layer.narrow_width)
            for name, layer in self.layers.items()
            if layer.width is not None and layer.narrow_width is not None
        }

    @property
    def asked(self) -> str | None:
        """What was asked for in place of a ratio, in words; None if a ratio was."""
        given = self.settings
        if "keep" in given:
            return f"{given['keep']} experts in every layer"
        if "target_size" in given:
            return f"weight files of at most {in_bytes(given['target_size'])}"
        if "fits" in given:
            tokens = f"{given['context']:,} tokens" if "context" in given else "some tokens"
            return f"weights and the cache of {tokens} in {in_bytes(given['fits'])} of memory"
        return None

    @property
    def calibrated_on(self) -> tuple[str, ...]:
        """Calibration groups that its scores are from; empty where it does not record them."""
        groups = dict.fromkeys(str(entry["group"]) for entry in self.data if "group" in entry)
        weights = self.weights or {}
        return tuple(group for group in groups if weights.get(group, 1) > 0)

    @property
    def record(self) -> dict[str, Any]:
        """The model it was made for, as `reap_kernels.model_match.differences` takes it."""
        facts = self.model.get("layers") or {}
        layers = {
            name: {**facts.get(name, {}), "num_experts": layer.num_experts}
            for name, layer in self.layers.items()
        }
        return {"model": self.model, "layers": layers}

    def noting(self, notes: Sequence[str]) -> "Plan":
        """A copy with more notes."""
        return replace(self, notes=[*self.notes, *(n for n in notes if n not in self.notes)])

    @property
    def kept(self) -> dict[str, tuple[int, ...]]:
        """Layer name -> ids that stay, ascending."""
        return {name: layer.kept for name, layer in self.layers.items()}

    def covering(self, experts: Mapping[str, int]) -> "Plan":
        """A copy with an entry for each of these layers; layers not named before keep all experts,
        with all their neurons.

        A checkpoint has one width of experts, so a plan that removes neurons must name every layer
        that shares it; what is missing there is refused when the plan is saved or applied.

        Args:
            experts: name of a layer -> its number of experts.
        """
        missing = {
            name: LayerPlan.keeping(number, tuple(range(number)))
            for name, number in experts.items()
            if name not in self.layers
        }
        return replace(self, layers={**self.layers, **missing}) if missing else self

    @typed
    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON, a line for each layer (temporary sibling, fsync, rename).

        Raises:
            PlanError: see `check`.
        """
        text = json_in_lines(self.check())
        with replaced(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def check(self) -> dict[str, Any]:
        """The content of its file.

        Raises:
            PlanError: a field has a value that `load` would refuse.
        """
        other = isinstance(self.layers, Mapping) and [
            name for name, layer in self.layers.items() if not isinstance(layer, LayerPlan)
        ]
        if not isinstance(self.layers, Mapping) or other:
            raise PlanError(
                f"plan: layers are {short(self.layers)}; give a LayerPlan under the name of each"
            )
        content: dict[str, Any] = {name: getattr(self, name) for name in _FIELDS}
        content |= {name: value for name in _IF_ANY if (value := getattr(self, name))}
        content["layers"] = {name: _entry(layer) for name, layer in self.layers.items()}
        complete = FORMAT.complete(content)
        _check_widths(self.layers, self.model.get("layers") or {})
        return complete

    @classmethod
    @typed
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """Reads and checks a plan.

        Raises:
            PlanError: the file cannot be read, is not a plan of this version, lacks a field, or has
                an invalid value; the message names file and field.
        """
        return cls._of(FORMAT.read(path), path)

    @classmethod
    @typed
    def parse(cls, content: bytes, where: str) -> "Plan":
        """Reads and checks what a file of a plan holds.

        Args:
            content: JSON in UTF-8.
            where: names it in messages.

        Raises:
            PlanError: see `load`.
        """
        return cls._of(FORMAT.parse(content, where), where)

    @classmethod
    def _of(cls, content: Mapping[str, Any], where: str | os.PathLike[str]) -> "Plan":
        """The plan of checked content."""
        layers = {}
        for name, entry in content["layers"].items():
            try:
                layers[name] = _layer(entry)
            except PlanError as error:
                raise FORMAT.refusal(where, f"layer {name}: {error}", ":") from error
        try:
            _check_widths(layers, content["model"].get("layers") or {})
        except PlanError as error:
            raise FORMAT.refusal(where, str(error), ":") from error
        fields = {name: content[name] for name in _FIELDS}
        fields |= {name: content.get(name, {}) for name in _IF_ANY}  # older plans lack some
        _check_protected(where, fields["settings"].get("protected", {}), layers)
        return cls(**fields, layers=layers)


def _entry(layer: LayerPlan) -> dict[str, Any]:
    """A layer as its file holds it."""
    entry = {key: getattr(layer, key) for key in _LAYER}
    if layer.width is not None and layer.neurons is not None:
        entry["width"] = layer.width
        entry["neurons"] = [to_bitmap(ids, layer.width) for ids in layer.neurons]
    return entry


def _layer(entry: Mapping[str, Any]) -> LayerPlan:
    """The layer that a file holds.

    Raises:
        PlanError: its ids or bitmaps are not as `LayerPlan` says.
    """
    neurons, width = entry.get("neurons"), entry.get("width")
    if neurons is not None and width is not None:
        try:
            neurons = tuple(from_bitmap(text, width) for text in neurons)
        except ValueError as error:
            raise PlanError(f"one of the bitmaps in neurons {error}") from error
    kept, removed = tuple(entry["kept"]), tuple(entry["removed"])
    return LayerPlan(entry["num_experts"], kept, removed, width, neurons)


def _check_widths(layers: Mapping[str, LayerPlan], facts: Mapping[str, Mapping[str, Any]]) -> None:
    """Checks that experts of one width before the cut have one width after it.

    Args:
        layers: of a plan.
        facts: of each layer, as far as the plan records them.

    Raises:
        PlanError: two layers differ, or some that may share the width of others do not say which
            neurons they keep.
    """
    first: dict[int | None, tuple[str, int]] = {}
    for name, layer in layers.items():
        narrow = layer.narrow_width
        if narrow is None:
            continue
        other, same = first.setdefault(layer.width, (name, narrow))
        if narrow != same:
            raise PlanError(
                f"layer {name!r} keeps {narrow} of {layer.width} neurons and layer {other!r} keeps "
                f"{same}; a checkpoint has one width of experts, so keep equally many"
            )
    whole = [
        name
        for name, layer in layers.items()
        if layer.neurons is None and facts.get(name, {}).get("intermediate_size") in (None, *first)
    ]
    if first and whole:
        raise PlanError(
            f"{named_layers(whole)} {'has' if len(whole) == 1 else 'have'} no `neurons`, other "
            "layers have; a checkpoint has one width of experts, so give every layer its neurons"
        )


def named_layers(names: Sequence[str]) -> str:
    """Layers in words, three of them by name."""
    first = ", ".join(map(repr, names[:3]))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"layer{'s' if len(names) > 1 else ''} {first}{more}"


def _check_protected(
    path: object, protected: Mapping[str, list[int]], layers: Mapping[str, LayerPlan]
) -> None:
    """Checks that protected experts are kept, which an edit of the file by hand may have broken."""
    for name, ids in protected.items():
        if not set(ids) <= set(layers[name].kept if name in layers else ()):
            raise PlanError(
                f"plan {path}: settings.protected of layer {name!r} is {short(ids)}, but these "
                "are not ids that the layer keeps; keep them, or protect others"
            )
