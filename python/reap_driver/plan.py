"""The plan: which experts each layer keeps, and its file, JSON that anybody can read."""

import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reap_driver.allocate import check_ratio
from reap_kernels.errors import PlanError
from reap_kernels.files import replaced

FORMAT = "reap-plan"
VERSION = 1


@dataclass(frozen=True)
class LayerPlan:
    """The experts of one layer: `kept` and `removed`, ascending, share out 0..num_experts - 1.

    Raises:
        PlanError: they do not.
    """

    num_experts: int
    kept: tuple[int, ...]
    removed: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("kept", "removed"):
            ids = getattr(self, name)
            if any(a >= b for a, b in itertools.pairwise(ids)):
                raise PlanError(f"{name} is not ascending without repetition: {_short(ids)}")
        if not self.kept:
            raise PlanError("kept is empty; a layer needs experts")
        if sorted([*self.kept, *self.removed]) != list(range(self.num_experts)):
            raise PlanError(
                f"kept {_short(self.kept)} and removed {_short(self.removed)} do not share out the "
                f"ids 0..{self.num_experts - 1}"
            )

    @classmethod
    def keeping(cls, num_experts: int, kept: tuple[int, ...]) -> "LayerPlan":
        """The plan that keeps `kept` and removes the rest."""
        stays = set(kept)
        return cls(num_experts, kept, tuple(e for e in range(num_experts) if e not in stays))


@dataclass(frozen=True)
class Plan:
    """Which experts every layer keeps, and where that came from.

    Attributes:
        model: `id`, `config_digest`, `model_type`, `architecture` of the model it was made for.
        criterion: what ranked the experts.
        allocation: how the number removed was shared out among layers.
        ratio: share of experts asked to be removed.
        layers: name of the experts module -> its plan.
        scores_digest: `Scores.digest()` of the scores.
        weights: shares of the calibration groups, None as observed.
        data: provenance of the calibration data, an entry a source.
        notes: what a reader should know, such as rounding.
        settings: what else the allocation was told: `protected` {layer: ids}, `layer_ratios`
            {layer: ratio}, `normalise`; absent where not used.
        version: of the format.
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
    version: int = VERSION

    @property
    def uniform(self) -> bool:
        """Whether layers with as many experts keep as many, so that one number says it all."""
        counts = {(layer.num_experts, len(layer.kept)) for layer in self.layers.values()}
        return len(counts) == len({experts for experts, _ in counts})

    @property
    def kept(self) -> dict[str, tuple[int, ...]]:
        """Layer name -> ids that stay, ascending."""
        return {name: layer.kept for name, layer in self.layers.items()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON, a line for each layer (temporary sibling, fsync, rename)."""
        head = {"format": FORMAT, "version": self.version}
        head |= {name: getattr(self, name) for name in _FIELDS}
        head |= {"settings": self.settings} if self.settings else {}
        lines = [
            f"    {json.dumps(name)}: "
            + json.dumps({key: getattr(layer, key) for key in _LAYER_FIELDS})
            for name, layer in self.layers.items()
        ]
        text = json.dumps(head, indent=2)[:-2] + ',\n  "layers": {\n' + ",\n".join(lines)
        with replaced(path) as temporary:
            temporary.write_text(text + "\n  }\n}\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """Reads and checks a plan.

        Raises:
            PlanError: the file cannot be read, is no plan of this version, lacks a field, or has a
                value that makes no sense; the message names file and field.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(f"plan {path} cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise PlanError(f"plan {path} is not JSON ({error}); make it again") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise PlanError(f"{path} is not a plan; make one with `reap-kernels plan`")
        if content.get("version") != VERSION:
            raise PlanError(
                f"plan {path} has version {content.get('version')!r}, this reap-kernels reads "
                f"{VERSION}; make the plan again with `reap-kernels plan`"
            )
        fields = {name: _checked(path, content, name, kind) for name, kind in _FIELDS.items()}
        layers = _checked(path, content, "layers", dict)
        if not layers:
            raise PlanError(f"plan {path}: field 'layers' is empty; make the plan again")
        check_ratio(fields["ratio"])
        if "settings" in content:  # plans of before had none
            fields["settings"] = _checked(path, content, "settings", dict)
        fields["layers"] = {name: _load_layer(path, name, e) for name, e in layers.items()}
        _check_protected(path, fields.get("settings", {}).get("protected", {}), fields["layers"])
        return cls(**fields)


_FIELDS: dict[str, Any] = {
    "model": dict,
    "criterion": str,
    "weights": dict | None,
    "allocation": str,
    "ratio": float | int,
    "scores_digest": str,
    "data": list,
    "notes": list,
}
_LAYER_FIELDS: dict[str, Any] = {"num_experts": int, "kept": list, "removed": list}


def _checked(path: Any, content: Mapping[str, Any], name: str, kind: Any) -> Any:
    """A field, there and of its kind."""
    if name not in content:
        raise PlanError(f"plan {path}: field {name!r} is missing; make the plan again")
    value = content[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise PlanError(
            f"plan {path}: field {name!r} is {_short(value)}; expected "
            f"{getattr(kind, '__name__', kind)}"
        )
    return value


def _load_layer(path: Any, name: str, entry: Any) -> LayerPlan:
    where = f"{path}: layer {name}"
    if not isinstance(entry, dict):
        raise PlanError(f"plan {where} is {_short(entry)}; expected an object")
    fields = {key: _checked(where, entry, key, kind) for key, kind in _LAYER_FIELDS.items()}
    for key in ("kept", "removed"):
        if any(not isinstance(e, int) or isinstance(e, bool) for e in fields[key]):
            raise PlanError(f"plan {where}: field {key!r} holds other things than expert ids")
    try:
        return LayerPlan(fields["num_experts"], tuple(fields["kept"]), tuple(fields["removed"]))
    except PlanError as error:
        raise PlanError(f"plan {where}: {error}; make the plan again") from error


def _check_protected(path: Any, protected: Any, layers: Mapping[str, LayerPlan]) -> None:
    """Protected experts are kept ones, as who edits a plan may forget."""
    for name, ids in protected.items() if isinstance(protected, dict) else [("", protected)]:
        kept = set(layers[name].kept) if name in layers else set()
        if not isinstance(ids, list) or not all(isinstance(e, int) and e in kept for e in ids):
            raise PlanError(
                f"plan {path}: settings.protected of layer {name!r} is {_short(ids)}, but these "
                "are not ids that the layer keeps; keep them, or protect others"
            )


def _short(value: Any) -> str:
    """A value as a message can show it."""
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 60 else text[:57] + "..."
